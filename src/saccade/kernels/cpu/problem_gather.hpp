// Attention of a few queries over lists of keys, as Python hands it over (`saccade.kernels.cpu.gather` mirrors it).
#pragma once
#include "problem.hpp"

namespace saccade {

// q [B, H, M, D], k [B, G, N, D], v [B, G, N, E]; D and E are multiples of the engine's vectors. Queries n * list_group ..
// of the heads of list head t attend to the keys lists[b, t, n, 0 .. list_length - 1], -1 being an empty slot. `list_heads`
// is G, or H for lists of each query head's own. `causal` also hides what comes after the query: one query per list then.
struct Gather {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  int32_t storage, threads;
  Rows q, k, v;
  void* out;   // [B, H, M, E], as q
  float* lse;  // [B, H, M], natural logarithm
  const float* sinks;  // [H], or null: logits that bring no value
  float scale, softcap;  // softcap 0: none
  const int64_t* lists;
  int64_t list_stride[3], list_heads, list_length, list_group, causal;
  // Row j of (b, g) is row j % page_size of page table[b, g, j / page_size], batch_stride being that of pages, and a slot at or
  // past lengths[b, g] is empty; `key_table` has the pages of the keys. Null: rows of k and v themselves.
  const int64_t *table, *key_table, *lengths;
  int64_t table_stride[2], key_table_stride[2], page_size;
};

constexpr int64_t MOST_SLOTS = 512;  // slots of a unit, at most

// A unit of work: what list (b, t, n) has in its slots start .. end - 1.
struct Stretch {
  int64_t b, t, n, start, end;
};

struct GatherEngine {
  int64_t (*scratch)(const Gather&);  // bytes per thread
  int64_t (*partial)(const Gather&);  // floats of a unit's result
  // Whether all slots point inside; where one does not, no key is read.
  bool (*run)(const Gather&, const Stretch&, char* scratch, float* partial);
  void (*join)(const Gather&, const Stretch&, float* partials, int64_t parts);
};

}  // namespace saccade
