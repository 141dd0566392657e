// What every custom op does with ONNX Runtime in a call: hand errors back, refuse, lend its threads.
#pragma once

#include <cstdio>

#include "../cpu/kimi_cpu.h"
#include "ort_abi.h"

namespace kimi::ort {

#define KIMI_TRY(call)                                  \
  do {                                                  \
    if (Status* const status_ = (call)) return status_; \
  } while (false)

// "name: what is wrong", as ONNX Runtime's error.
template <class... Values>
Status* refusal(const Api* api, const char* name, const char* format, Values... values) {
  char message[400];
  const int written = std::snprintf(message, sizeof message, "%s: ", name);
  std::snprintf(message + written, sizeof message - static_cast<size_t>(written), format, values...);
  return api->CreateStatus(ErrorCode::kInvalidArgument, message);
}

// The session's threads, as cpu::Parallel's context.
struct Threads {
  const Api* api;
  KernelContext* context;
  Status* failed;

  // One batch for each task: a task takes its pieces itself.
  static void run(void* self, void (*task)(void* argument, size_t index), size_t tasks, void* argument) {
    Threads& threads = *static_cast<Threads*>(self);
    Status* const status = threads.api->KernelContext_ParallelFor(threads.context, task, tasks, 0, argument);
    if (status == nullptr) return;
    if (threads.failed != nullptr) threads.api->ReleaseStatus(threads.failed);
    threads.failed = status;
  }
};

}  // namespace kimi::ort
