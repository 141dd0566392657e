// Threads that go through a kernel's phases together, started once for all of them.
#pragma once

#include "level.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <thread>

namespace kimi::cpu {
namespace {

// What has been begun and what has been done of one phase's pieces.
struct alignas(64) Phase {
  int64_t next, done;
};

// One thread's place in the phases. Every thread runs the same code, with the same phases in the same order; `each`
// shares a phase's pieces out and returns when all of them are done. A thread waits only for pieces that others have
// begun, so that it does not matter when, or whether, those others are run: one thread alone does everything.
class Team {
 public:
  // body(team, slot) on all threads of `parallel`, with at most `count` calls of `each`; `phases` is memory for those,
  // and `slot` is below parallel.threads.
  template <class Body>
  static void run(const Parallel& parallel, Phase* phases, int64_t count, const Body& body) {
    for (int64_t i = 0; i < count; ++i) phases[i] = {0, 0};
    struct Shared {
      const Body& body;
      Phase* phases;
    } shared = {body, phases};
    auto work = [](void* argument, size_t slot) {
      const Shared& all = *static_cast<const Shared*>(argument);
      Team team(all.phases);
      all.body(team, static_cast<int64_t>(slot));
    };
    if (parallel.threads > 1)
      parallel.run(parallel.context, work, static_cast<size_t>(parallel.threads), &shared);
    else
      work(&shared, 0);
  }

  // task(index) for each index below `count`.
  template <class Task>
  void each(int64_t count, const Task& task) {
    Phase& phase = *phase_++;
    int64_t index;
    while ((index = __atomic_fetch_add(&phase.next, 1, __ATOMIC_RELAXED)) < count) {
      task(index);
      __atomic_fetch_add(&phase.done, 1, __ATOMIC_RELEASE);
    }
    for (int64_t looks = 0; __atomic_load_n(&phase.done, __ATOMIC_ACQUIRE) < count; ++looks) wait(looks);
  }

 private:
  explicit Team(Phase* phases) : phase_(phases) {}

  static void wait(int64_t looks) {
    // longer than a piece takes: the thread that has it may be waiting for this processor
    if (looks > kLooks) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  static constexpr int64_t kLooks = 1 << 12;
  Phase* phase_;
};

}  // namespace
}  // namespace kimi::cpu
