// MixtureOfExperts and QuantizedMixtureOfExperts: the router, the tokens of each expert, gate and up with SwiGLU, down.
//
// Experts that few tokens chose are a matter of memory: their rows are read once, along the row (moe_rows.h,
// moe_levels.h). The others are a matter of arithmetic: strips of tokens, one to a lane (moe_tiles.h). Both run in two
// parts on all threads. First units of (expert, tokens, range of rows) of gate and up. Then ranges of output columns,
// each of which goes through all experts in their order, so that no two threads add to one sum.
#include "moe_router.h"
#include "team.h"
#include "weight_rows.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kFew = kLanes / 2 > 4 ? kLanes / 2 : 4;  // tokens of an expert up to which its rows are summed along
constexpr int64_t kFewSteps = 4;                           // the same where strips multiply bytes
constexpr int64_t kRouterTokens = 16;                      // tokens of a routing task
constexpr int64_t kRouterBytes = 1 << 18;                  // of router weights from which few tokens share the threads
constexpr int64_t kPreparedTokens = 2;                     // tokens of a task that prepares them
constexpr int64_t kPhases = 6;
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kDownRows = 64;  // the most rows of a down task
constexpr int64_t kBatch = 32;     // rows of gate and up between two SwiGLUs of few tokens

// Tokens of one expert that are computed together: a strip, or with width 0 few.
struct Unit {
  int32_t expert, first, count, width;  // `first` counts choices, sorted by expert
  int64_t activation;                   // floats before it
};

// The workspace, in order.
struct Memory {
  float *logits, *weights, *sorted_weights, *prepared, *activations, *scratch;
  int32_t *experts, *tokens, *offsets, *wanted;
  Unit* units;
  Phase* phases;
  int64_t steps, panel, scratch_floats;  // of a thread's scratch: floats before its parts, after a strip, and all
  size_t bytes;
};

template <class Rows>
Memory lay_out(const MixtureOfExpertsArguments& a, const Parallel& parallel) {
  const int64_t choices = a.tokens * a.top_k;
  const int64_t most_units = least(choices, a.num_experts + choices / (kStrip / 2));
  // a strip has more than kFew tokens and is padded to whole vectors
  const int64_t padding = least(most_units, choices / kFewSteps) * (kLanes - 1);
  const int64_t widest = most(a.hidden, a.intermediate);
  const int64_t panel = std::is_same_v<Rows, WeightRows> ? 0 : kTileRows * widest;
  Memory m{};
  m.steps = most(Rows::kStepStrips ? widest : a.hidden, kDownRows) * kStrip;
  m.panel = m.steps + (Rows::kStepStrips ? StepStrip::size(a.hidden, kStrip, a.block_size) : 0);
  m.scratch_floats = round_up(m.panel + panel, 16);
  const auto start = reinterpret_cast<uintptr_t>(a.workspace);
  uintptr_t at = start;
  auto take = [&at](auto*& pointer, int64_t count) {
    at = (at + 63) & ~uintptr_t{63};
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += static_cast<size_t>(count) * sizeof *pointer;
  };
  take(m.logits, a.tokens * a.num_experts);
  take(m.experts, choices);
  take(m.weights, choices);
  take(m.tokens, choices);
  take(m.sorted_weights, choices);
  take(m.offsets, a.num_experts + 1);
  take(m.wanted, a.tokens);
  take(m.units, most_units);
  take(m.phases, kPhases);
  take(m.prepared, std::is_same_v<Rows, WeightRows> ? 0 : a.tokens * Rows::prepared(a.hidden));
  take(m.activations, most(choices * Rows::prepared(a.intermediate), (choices + padding) * a.intermediate));
  take(m.scratch, m.scratch_floats * parallel.threads);
  m.bytes = at - start + 64;
  return m;
}

template <class Rows>
class MixtureOfExperts {
 public:
  MixtureOfExperts(const MixtureOfExpertsArguments& a, const Parallel& parallel)
      : a_(a), parallel_(parallel), m_(lay_out<Rows>(a, parallel)) {}

  void run() {
    if (a_.tokens == 0) return;
    Team::run(parallel_, m_.phases, kPhases, [&](Team& team, int64_t slot) {
      route(team);
      team.each(1, [&](int64_t) {
        sort();
        want();
      });
      prepare(team);
      float* const scratch = m_.scratch + slot * m_.scratch_floats;
      gate_up(team, scratch);
      down(team, scratch);
    });
  }

 private:
  void choose_for(int64_t t) {
    choose(a_, m_.logits + t * a_.num_experts, m_.experts + t * a_.top_k, m_.weights + t * a_.top_k);
  }

  void route(Team& team) {
    const int64_t blocks = ceil_div(a_.tokens, kRouterTokens);
    const int64_t bytes = a_.num_experts * a_.hidden * 4;
    if (blocks < parallel_.threads && bytes >= kRouterBytes) {
      const int64_t parts = least(a_.num_experts, parallel_.threads * 2), size = ceil_div(a_.num_experts, parts);
      team.each(parts, [&](int64_t i) {
        router_logits(a_, 0, a_.tokens, least(i * size, a_.num_experts), least((i + 1) * size, a_.num_experts),
                      m_.logits);
      });
      team.each(blocks, [&](int64_t i) {
        for (int64_t t = i * kRouterTokens; t < least((i + 1) * kRouterTokens, a_.tokens); ++t) choose_for(t);
      });
      return;
    }
    team.each(blocks, [&](int64_t i) {
      const int64_t begin = i * kRouterTokens, end = least(begin + kRouterTokens, a_.tokens);
      router_logits(a_, begin, end, 0, a_.num_experts, m_.logits);
      for (int64_t t = begin; t < end; ++t) choose_for(t);
    });
  }

  // Sorts the choices by expert, each expert's by token, and makes the units.
  void sort() {
    const int64_t choices = a_.tokens * a_.top_k;
    int32_t* offsets = m_.offsets;
    for (int64_t e = 0; e <= a_.num_experts; ++e) offsets[e] = 0;
    for (int64_t i = 0; i < choices; ++i) ++offsets[m_.experts[i] + 1];
    for (int64_t e = 0; e < a_.num_experts; ++e) offsets[e + 1] += offsets[e];
    int64_t activation = 0;
    for (int64_t e = 0; e < a_.num_experts; ++e) {
      int32_t first = offsets[e], left = offsets[e + 1] - offsets[e];
      if (left == 0) continue;
      if (left <= (Rows::kStepStrips ? kFewSteps : kFew)) {
        m_.units[units_++] = {static_cast<int32_t>(e), first, left, 0, activation};
        activation += left * Rows::prepared(a_.intermediate);
        continue;
      }
      int64_t vecs = ceil_div(left, kLanes), strips = ceil_div(vecs, kTileVecs);
      for (; strips > 0; --strips) {
        const int64_t width = ceil_div(vecs, strips) * kLanes;
        const int32_t count = static_cast<int32_t>(least(width, left));
        m_.units[units_++] = {static_cast<int32_t>(e), first, count, static_cast<int32_t>(width), activation};
        activation += width * a_.intermediate;
        first += count;
        left -= count;
        vecs -= width / kLanes;
      }
    }
    for (int64_t i = 0; i < choices; ++i) {
      const int32_t place = offsets[m_.experts[i]]++;
      m_.tokens[place] = static_cast<int32_t>(i / a_.top_k);
      m_.sorted_weights[place] = m_.weights[i];
    }
  }

  // Notes the tokens that units of few tokens read.
  void want() {
    for (int64_t t = 0; t < a_.tokens; ++t) m_.wanted[t] = 0;
    for (int64_t u = 0; u < units_; ++u) {
      const Unit& unit = m_.units[u];
      for (int64_t i = 0; unit.width == 0 && i < unit.count; ++i) m_.wanted[m_.tokens[unit.first + i]] = 1;
    }
  }

  // Puts those into the order of their levels.
  void prepare(Team& team) {
    if constexpr (!std::is_same_v<Rows, WeightRows>) {
      team.each(ceil_div(a_.tokens, kPreparedTokens), [&](int64_t i) {
        for (int64_t t = i * kPreparedTokens; t < least((i + 1) * kPreparedTokens, a_.tokens); ++t) {
          if (!m_.wanted[t]) continue;
          Rows::prepare(a_.hidden_states + t * a_.hidden, 0, a_.hidden, a_.hidden, a_.block_size,
                        m_.prepared + t * Rows::prepared(a_.hidden));
        }
      });
    }
  }

  void gate_up(Team& team, float* scratch) {
    const int64_t granules = ceil_div(a_.intermediate, Rows::granule(a_.block_size));
    const int64_t wanted = ceil_div(kTasksPerThread * parallel_.threads, units_);
    const int64_t size = ceil_div(granules, least(granules, wanted)) * Rows::granule(a_.block_size);
    const int64_t parts = ceil_div(a_.intermediate, size);
    team.each(units_ * parts, [&](int64_t i) {
      const Unit& unit = m_.units[i / parts];
      const int64_t begin = i % parts * size, end = least(begin + size, a_.intermediate);
      const Rows rows(a_.gate_up, unit.expert, 2 * a_.intermediate, a_.hidden, a_.block_size);
      if (unit.width)
        strip_gate_up(rows, unit, begin, end, scratch);
      else
        few_gate_up(rows, unit, begin, end);
    });
  }

  // Activations [begin, end) of a unit of few tokens, prepared for `down`.
  void few_gate_up(const Rows& rows, const Unit& unit, int64_t begin, int64_t end) {
    const int64_t granule = Rows::granule(a_.block_size);
    for (int64_t j = begin; j < end; j += granule) {
      const int64_t stop = least(j + granule, end);
      // room for the largest granule, and the rounding reads whole blocks before its own columns
      float activations[kFew][kMaxGranule];
      for (int64_t batch = j; batch < stop; batch += kBatch / 2) {
        const int64_t last = least(batch + kBatch / 2, stop);
        for (int64_t m = 0; m < unit.count; m += kFewAtOnce) {
          const int64_t count = least(unit.count - m, kFewAtOnce);
          const float* x[kFewAtOnce];
          for (int64_t i = 0; i < count; ++i) x[i] = input(m_.tokens[unit.first + m + i]);
          float gate[kFewAtOnce][kBatch / 2], up[kFewAtOnce][kBatch / 2];
          few_products(rows, 2 * batch, 2 * last, x, count,
                       [&](int64_t row, int64_t i, float sum) { (row % 2 ? up : gate)[i][row / 2 - batch] = sum; });
          for (int64_t i = 0; i < count; ++i) swiglu(gate[i], up[i], last - batch, activations[m + i] + (batch - j));
        }
      }
      for (int64_t m = 0; m < unit.count; ++m) {
        // `prepare` counts columns from the row's start
        float* to = m_.activations + unit.activation + m * Rows::prepared(a_.intermediate);
        Rows::prepare(activations[m] - j, j, stop, a_.intermediate, a_.block_size, to);
      }
    }
  }

  void strip_gate_up(const Rows& rows, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    const float* x[kStrip];
    for (int64_t i = 0; i < unit.count; ++i) x[i] = a_.hidden_states + m_.tokens[unit.first + i] * a_.hidden;
    const int64_t width = unit.width;
    pack_strip(x, unit.count, width, a_.hidden, scratch);
    float* activations = m_.activations + unit.activation;
    if constexpr (Rows::kStepStrips) {
      const StepStrip steps(scratch + m_.steps, a_.hidden, width, a_.block_size);
      round_to_steps<Rows::kInterleave>(scratch, 0, a_.hidden, width, a_.block_size, steps);
      // the strip's floats are not needed any more
      strip_swiglu(rows, width, begin, end, steps, scratch + m_.panel, scratch);
      round_to_steps<Rows::kInterleave>(scratch, begin, end, width, a_.block_size,
                                        StepStrip(activations, a_.intermediate, width, a_.block_size));
    } else {
      if constexpr (Rows::kRounds) round_strip(scratch, a_.hidden, width, a_.block_size);
      strip_swiglu(rows, width, begin, end, scratch, scratch + m_.panel, activations + begin * width);
      if constexpr (Rows::kRounds) round_strip(activations + begin * width, end - begin, width, a_.block_size);
    }
  }

  // Activations [begin, end) of a strip, into [end - begin, width].
  template <class Strip>
  void strip_swiglu(const Rows& rows, int64_t width, int64_t begin, int64_t end, const Strip& strip, float* panel,
                    float* to) {
    for (int64_t r = 2 * begin; r < 2 * end; r += kTileRows) {
      const int64_t count = least(kTileRows, 2 * end - r);
      float y[kTileRows * kStrip];
      strip_products(rows, r, count, width, a_.hidden, strip, panel, y);
      for (int64_t i = 0; i < count; i += 2) {
        swiglu(y + i * width, y + (i + 1) * width, width, to + ((r + i) / 2 - begin) * width);
      }
    }
  }

  void down(Team& team, float* scratch) {
    bool few = true;
    for (int64_t u = 0; u < units_; ++u) few = few && m_.units[u].width == 0;
    if (few) {
      const Pieces pieces{ceil_div(a_.hidden, kLanes), parallel_.threads};
      team.each(pieces.count(), [&](int64_t i) {
        down_columns(pieces.begin(i) * kLanes, least(pieces.begin(i + 1) * kLanes, a_.hidden), scratch);
      });
      return;
    }
    const int64_t wanted = ceil_div(a_.hidden, kTasksPerThread * parallel_.threads);
    const int64_t size = least(round_up(wanted, kLanes), kDownRows);
    team.each(ceil_div(a_.hidden, size),
              [&](int64_t i) { down_columns(i * size, least((i + 1) * size, a_.hidden), scratch); });
  }

  // Columns [begin, end) of the output, which no other thread writes.
  void down_columns(int64_t begin, int64_t end, float* scratch) {
    for (int64_t t = 0; t < a_.tokens; ++t) fill_zero(a_.output + t * a_.hidden + begin, end - begin);
    for (int64_t u = 0; u < units_; ++u) {
      const Unit& unit = m_.units[u];
      const Rows rows(a_.down, unit.expert, a_.hidden, a_.intermediate, a_.block_size);
      if (unit.width)
        strip_down(rows, unit, begin, end, scratch);
      else
        few_down(rows, unit, begin, end);
    }
  }

  void few_down(const Rows& rows, const Unit& unit, int64_t begin, int64_t end) {
    const int64_t length = Rows::prepared(a_.intermediate);
    for (int64_t m = 0; m < unit.count; m += kFewAtOnce) {
      const int64_t count = least(unit.count - m, kFewAtOnce);
      const float* x[kFewAtOnce];
      for (int64_t i = 0; i < count; ++i) x[i] = m_.activations + unit.activation + (m + i) * length;
      few_products(rows, begin, end, x, count, [&](int64_t row, int64_t i, float sum) {
        const int64_t choice = unit.first + m + i;
        a_.output[m_.tokens[choice] * a_.hidden + row] += m_.sorted_weights[choice] * sum;
      });
    }
  }

  void strip_down(const Rows& rows, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    float* activations = m_.activations + unit.activation;
    const int64_t width = unit.width;
    for (int64_t r = begin; r < end; r += kTileRows) {
      const int64_t count = least(kTileRows, end - r);
      float* y = scratch + (r - begin) * width;
      if constexpr (Rows::kStepStrips) {
        const StepStrip strip(activations, a_.intermediate, width, a_.block_size);
        strip_products(rows, r, count, width, a_.intermediate, strip, scratch + m_.panel, y);
      } else {
        strip_products(rows, r, count, width, a_.intermediate, activations, scratch + m_.panel, y);
      }
    }
    float* output[kStrip];
    for (int64_t i = 0; i < unit.count; ++i) output[i] = a_.output + m_.tokens[unit.first + i] * a_.hidden + begin;
    add_transposed(scratch, width, end - begin, unit.count, m_.sorted_weights + unit.first, output);
  }

  // What a row of few tokens is multiplied with.
  const float* input(int64_t token) const {
    if constexpr (std::is_same_v<Rows, WeightRows>)
      return a_.hidden_states + token * a_.hidden;
    else
      return m_.prepared + token * Rows::prepared(a_.hidden);
  }

  static constexpr int64_t kMaxGranule = 128;
  const MixtureOfExpertsArguments& a_;
  const Parallel& parallel_;
  const Memory m_;
  int64_t units_ = 0;
};

}  // namespace

namespace KIMI_CPU_LEVEL {

size_t mixture_of_experts_workspace(const MixtureOfExpertsArguments& arguments, const Parallel& parallel) {
  return with_rows(arguments.bits, arguments.int8_activations, [&](auto* rows) {
    return lay_out<std::remove_pointer_t<decltype(rows)>>(arguments, parallel).bytes;
  });
}

Status mixture_of_experts(const MixtureOfExpertsArguments& arguments, const Parallel& parallel) {
  with_rows(arguments.bits, arguments.int8_activations, [&](auto* rows) {
    MixtureOfExperts<std::remove_pointer_t<decltype(rows)>>(arguments, parallel).run();
    return 0;
  });
  return {};
}

}  // namespace KIMI_CPU_LEVEL
}  // namespace kimi::cpu
