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
    each(count, task, [](int64_t) {}, false);
  }

  // The same before another `each`: a thread that has to wait takes its first index of that one and calls warm(index).
  template <class Task, class Warm>
  void each_before(int64_t count, const Task& task, const Warm& warm) {
    each(count, task, warm, true);
  }

 private:
  explicit Team(Phase* phases) : phase_(phases) {}

  static int64_t claim(Phase* phase) { return __atomic_fetch_add(&phase->next, 1, __ATOMIC_RELAXED); }

  template <class Task, class Warm>
  void each(int64_t count, const Task& task, const Warm& warm, bool another) {
    Phase* const phase = phase_++;
    for (int64_t index = claimed_ < 0 ? claim(phase) : claimed_; index < count; index = claim(phase)) {
      task(index);
      __atomic_fetch_add(&phase->done, 1, __ATOMIC_RELEASE);
    }
    claimed_ = -1;
    for (int64_t looks = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < count; ++looks) {
      if (another && looks == 0) {
        claimed_ = claim(phase_);
        warm(claimed_);
      }
      wait(looks);
    }
  }

  static void wait(int64_t looks) {
    // longer than a piece takes: the thread that has it may be waiting for this processor
    if (looks > kLooks) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  static constexpr int64_t kLooks = 1 << 12;
  Phase* phase_;
  int64_t claimed_ = -1;  // an index of the next phase, or none
};

// `total` rows or bytes in pieces for so many threads: a large one each, which is one stream of memory, and small ones
// for whoever is done first.
struct Pieces {
  int64_t total, threads;

  int64_t count() const { return 3 * threads; }
  // Where piece `index` begins, and the one before it ends.
  int64_t begin(int64_t index) const {
    const int64_t eighths = index <= threads ? 6 * index : 5 * threads + index;
    return total * eighths / (8 * threads);
  }
};

}  // namespace
}  // namespace kimi::cpu
