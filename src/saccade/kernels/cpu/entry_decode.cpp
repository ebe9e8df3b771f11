// Attention of few queries, cut along the keys so that one sequence with few heads still uses every core. The cuts depend
// on the problem's sizes alone and their results are joined in order: the same bits whatever the number of threads.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

namespace {

constexpr int64_t SHORTEST = 512, LONGEST = 4096;  // keys of a unit
constexpr int64_t UNITS = 128;                     // enough for any number of cores

int64_t cuts(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// Keys of a unit: memory takes a moment to get going at the start of each, so the fewer units, the better.
int64_t stretch_of(int64_t slots, int64_t sets) {
  const int64_t keys = slots * sets / UNITS / SHORTEST * SHORTEST;
  return keys < SHORTEST ? SHORTEST : keys > LONGEST ? LONGEST : keys;
}

}  // namespace

// 0, or 1 if memory ran out.
EXPORT int saccade_decode(const Decode* p) {
  const int64_t slots = p->lists ? p->list_length : p->a.keys;
  const int64_t lists = cuts(p->a.queries, p->list_group), share = p->a.heads / p->list_heads;
  const int64_t rows = share * p->list_group, most = rows < engine->decode_rows ? rows : engine->decode_rows;
  const int64_t blocks = cuts(rows, engine->decode_rows), sets = p->a.batch * p->list_heads * lists * blocks;
  const int64_t stretch_keys = stretch_of(slots, sets), stretches = cuts(slots > 0 ? slots : 1, stretch_keys);
  const int64_t partial = engine->decode_partial(*p, most), scratch_bytes = engine->decode_scratch(*p, most);
  auto part_of = [=](int64_t set, int64_t stretch) {
    int64_t block = set % blocks, n = set / blocks % lists, t = set / blocks / lists % p->list_heads;
    int64_t members = p->a.queries - n * p->list_group;
    if (members > p->list_group) members = p->list_group;
    int64_t first = block * engine->decode_rows, count = share * members - first;
    if (count > engine->decode_rows) count = engine->decode_rows;
    int64_t start = stretch * stretch_keys, end = start + stretch_keys < slots ? start + stretch_keys : slots;
    return Part{set / blocks / lists / p->list_heads, t, n, first, count, start, end};
  };
  float* partials = nullptr;
  if (stretches > 1) {
    partials = static_cast<float*>(std::malloc(size_t(sets * stretches * partial) * sizeof(float)));
    if (!partials) return 1;
  }
  const int64_t units = sets * stretches;
  int failed = share_out_ahead(p->a.threads, units, scratch_bytes + partial * 4 + 64, [=](int64_t number, int64_t next, char* scratch) {
    Part part = part_of(number / stretches, number % stretches), following{};
    if (part.count <= 0) return;
    if (next >= 0) following = part_of(next / stretches, next % stretches);
    float* result = partials ? partials + number * partial : reinterpret_cast<float*>(scratch + scratch_bytes);
    engine->decode(*p, part, following.count > 0 ? &following : nullptr, scratch, result);
    if (!partials) engine->decode_join(*p, part, result, partial, 1);
  });
  if (partials && !failed) {
    // Few floats are not worth waking threads.
    int threads = sets * stretches * partial < 65536 ? 1 : p->a.threads;
    failed = share_out(threads, sets, 64, [=](int64_t set, char*) {
      Part part = part_of(set, 0);
      if (part.count > 0) engine->decode_join(*p, part, partials + set * stretches * partial, partial, stretches);
    });
  }
  std::free(partials);
  return failed;
}
