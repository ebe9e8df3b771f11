// Softmax attention, cut into units and shared out over threads.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

// 0, or 1 if memory ran out.
EXPORT int saccade_attend(const Attention* p) {
  // Units are cut within the layout's blocks; the last ones of a head, which causality makes the longest, come first.
  int64_t unit = engine->attend_unit, block = p->indptr ? p->block_q : (p->queries < unit ? p->queries : unit);
  int64_t blocks = (p->queries + block - 1) / block, cuts = (block + unit - 1) / unit, per_head = blocks * cuts;
  return share_out(p->threads, p->batch * p->heads * per_head, engine->attend_scratch(*p), [=](int64_t number, char* scratch) {
    int64_t place = per_head - 1 - number % per_head, head = number / per_head;
    int64_t start = place / cuts * block, first = start + place % cuts * unit;
    int64_t end = start + block < p->queries ? start + block : p->queries;
    if (first >= end) return;
    engine->attend(*p, scratch, head / p->heads, head % p->heads, first, end - first < unit ? end - first : unit);
  });
}
