#include "report.h"

#include <atomic>
#include <cstdio>

#include "process.h"

namespace kimi {

namespace {
std::atomic<void*> logger_finder{nullptr};
std::atomic<void (*)(const char*)> error_callback{nullptr};
}  // namespace

void set_logger_finder(void* finder) noexcept { logger_finder = finder; }

void set_error_callback(void (*callback)(const char*)) noexcept { error_callback = callback; }

void report(const char* where, const char* message) noexcept {
  try {
    const std::string text = std::string(where) + ": " + message;
    if (const auto callback = error_callback.load()) {
      callback(text.c_str());
    } else if (const Logger logger = logger_of_process(logger_finder)) {
      logger.error(text.c_str());
    } else {
      std::fprintf(stderr, "%s\n", text.c_str());
    }
  } catch (...) {
    // an error that cannot even be said; the caller still returns its failure
  }
}

}  // namespace kimi
