// Attention of few queries over lists of keys, each list cut into stretches. The cuts depend on the problem's sizes alone
// and their results are joined in order: the same bits whatever the number of threads.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

namespace {

constexpr int64_t ENOUGH = 128;  // lists that keep any number of cores busy

struct Cuts {
  int64_t lists, sets, stretches, partial, scratch;  // `partial` in floats, `scratch` in bytes

  explicit Cuts(const Gather& p)
      : lists((p.queries + p.list_group - 1) / p.list_group),
        sets(p.batch * p.list_heads * lists),
        stretches((p.list_length + MOST_SLOTS - 1) / MOST_SLOTS),
        partial(engine->gather.partial(p)),
        scratch((engine->gather.scratch(p) + 63) / 64 * 64) {}

  Stretch unit(const Gather& p, int64_t set, int64_t stretch) const {
    const int64_t start = stretch * MOST_SLOTS, end = start + MOST_SLOTS < p.list_length ? start + MOST_SLOTS : p.list_length;
    return Stretch{set / lists / p.list_heads, set / lists % p.list_heads, set % lists, start, end};
  }
};

// A thread takes a whole list, so that the results of its stretches are only ever in the thread's scratch.
int by_lists(const Gather& p, const Cuts& cuts, std::atomic<bool>* inside) {
  const int64_t bytes = cuts.scratch + cuts.stretches * cuts.partial * int64_t(sizeof(float));
  return share_out(p.threads, cuts.sets, bytes, [&](int64_t set, char* memory) {
    float* results = reinterpret_cast<float*>(memory + cuts.scratch);
    bool good = true;
    for (int64_t n = 0; n < cuts.stretches; ++n)
      good &= engine->gather.run(p, cuts.unit(p, set, n), memory, results + n * cuts.partial);
    if (good)
      engine->gather.join(p, cuts.unit(p, set, 0), results, cuts.stretches);
    else
      *inside = false;
  });
}

// Few long lists: threads share their stretches.
int by_stretches(const Gather& p, const Cuts& cuts, std::atomic<bool>* inside) {
  const int64_t floats = cuts.sets * cuts.stretches * cuts.partial;
  float* results = static_cast<float*>(std::malloc(size_t(floats) * sizeof(float)));
  if (!results) return 1;
  int failed = share_out(p.threads, cuts.sets * cuts.stretches, cuts.scratch, [&](int64_t number, char* memory) {
    const Stretch part = cuts.unit(p, number / cuts.stretches, number % cuts.stretches);
    if (!engine->gather.run(p, part, memory, results + number * cuts.partial)) *inside = false;
  });
  if (!failed && *inside) {
    const int threads = floats < 65536 ? 1 : p.threads;  // few floats are not worth waking threads
    failed = share_out(threads, cuts.sets, 64, [&](int64_t set, char*) {
      engine->gather.join(p, cuts.unit(p, set, 0), results + set * cuts.stretches * cuts.partial, cuts.stretches);
    });
  }
  std::free(results);
  return failed;
}

}  // namespace

// 0; 1 if memory ran out; 2 if a slot points outside.
EXPORT int saccade_gather(const Gather* p) {
  const Cuts cuts(*p);
  std::atomic<bool> inside{true};
  const bool whole = cuts.stretches == 1 || cuts.sets >= ENOUGH;
  const int failed = whole ? by_lists(*p, cuts, &inside) : by_stretches(*p, cuts, &inside);
  return failed ? 1 : inside ? 0 : 2;
}
