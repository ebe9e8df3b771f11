// Scores of few queries over a stored cache, cut along the keys: each is written once, so the cuts change no bit.
#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

// a.out is [B, H, M, keys] and a.keys the greatest length; 0, or 1 if memory ran out.
EXPORT int saccade_decode_scores(const Decode* p) {
  constexpr int64_t STRETCH = 1024;
  const int64_t stretches = (p->a.keys + STRETCH - 1) / STRETCH, heads = p->a.batch * p->a.kv_heads;
  return share_out(p->a.threads, heads * stretches, engine->score_scratch(*p), [=](int64_t number, char* scratch) {
    const int64_t head = number / stretches, start = number % stretches * STRETCH;
    const int64_t end = start + STRETCH < p->a.keys ? start + STRETCH : p->a.keys;
    engine->decode_scores(*p, scratch, head / p->a.kv_heads, head % p->a.kv_heads, start, end);
  });
}
