// Refusals, and where they are said: no exception leaves a plugin, every one becomes a message of TensorRT's logger.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

namespace kimi {

// What failed, what was seen and expected, and the fix, in one line.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Logs an error with the logger of the TensorRT that is in use, or on stderr when there is none. Never throws.
void report(const char* where, const char* message) noexcept;

// An ILoggerFinder, which TensorRT hands over for version-compatible plans.
void set_logger_finder(void* finder) noexcept;

// Where errors go instead of to TensorRT; null: to TensorRT again.
void set_error_callback(void (*callback)(const char*)) noexcept;

// Runs `body` at an edge that must not throw; what it throws is reported and `failed` returned.
template <class Result, class Body>
Result guarded(const char* where, Result failed, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    report(where, error.what());
  } catch (...) {
    report(where, "unknown exception");
  }
  return failed;
}

}  // namespace kimi
