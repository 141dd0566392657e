#include "report.h"

#include <atomic>
#include <cstdio>

#include "process.h"

namespace kimi {

namespace {
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void report(const char* where, const char* message) noexcept {
  try {
    const std::string text = std::string(where) + ": " + message;
    nvinfer1::ILogger* logger = nullptr;
    if (nvinfer1::ILoggerFinder* finder = logger_finder) logger = finder->findLogger();
    if (logger == nullptr) logger = logger_of_process();
    if (logger != nullptr) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    } else {
      std::fprintf(stderr, "%s\n", text.c_str());
    }
  } catch (...) {
    // an error that cannot even be said; the caller still returns its failure
  }
}

}  // namespace kimi
