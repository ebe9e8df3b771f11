// Attention of few queries over lists of keys, each list cut into stretches. The cuts depend on the problem's sizes alone
// and their results are joined in order: the same bits whatever the number of threads.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

// 0; 1 if memory ran out; 2 if a slot points outside.
EXPORT int saccade_gather(const Gather* p) {
  const GatherEngine& gather = engine->gather;
  const int64_t lists = (p->queries + p->list_group - 1) / p->list_group, sets = p->batch * p->list_heads * lists;
  const int64_t stretches = (p->list_length + MOST_SLOTS - 1) / MOST_SLOTS, partial = gather.partial(*p), scratch = gather.scratch(*p);
  auto unit = [=](int64_t set, int64_t stretch) {
    const int64_t start = stretch * MOST_SLOTS, end = start + MOST_SLOTS < p->list_length ? start + MOST_SLOTS : p->list_length;
    return Stretch{set / lists / p->list_heads, set / lists % p->list_heads, set % lists, start, end};
  };
  float* partials = nullptr;
  if (stretches > 1) {
    partials = static_cast<float*>(std::malloc(size_t(sets * stretches * partial) * sizeof(float)));
    if (!partials) return 1;
  }
  std::atomic<bool> inside{true};
  int failed = share_out(p->threads, sets * stretches, scratch + partial * 4 + 64, [&](int64_t number, char* memory) {
    const Stretch part = unit(number / stretches, number % stretches);
    float* result = partials ? partials + number * partial : reinterpret_cast<float*>(memory + (scratch + 63) / 64 * 64);
    if (!gather.run(*p, part, memory, result))
      inside = false;
    else if (!partials)
      gather.join(*p, part, result, 1);
  });
  if (partials && !failed && inside) {
    const int threads = sets * stretches * partial < 65536 ? 1 : p->threads;  // few floats are not worth waking threads
    failed = share_out(threads, sets, 64, [&](int64_t set, char*) {
      gather.join(*p, unit(set, 0), partials + set * stretches * partial, stretches);
    });
  }
  std::free(partials);
  return failed ? 1 : inside ? 0 : 2;
}
