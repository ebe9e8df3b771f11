// Attention over tokens packed in groups, cut along the groups as Python says: it joins the cuts.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

// 0, or 1 if memory ran out.
EXPORT int saccade_attend_groups(const Groups* p) {
  const int64_t heads = p->batch * p->kv_heads;
  return share_out(p->threads, heads * p->cuts, engine->group_scratch(*p), [=](int64_t number, char* scratch) {
    const int64_t head = number / p->cuts, cut = number % p->cuts, start = cut * p->stretch;
    engine->attend_groups(*p, scratch, head / p->kv_heads, head % p->kv_heads, start, start + p->stretch, cut);
  });
}
