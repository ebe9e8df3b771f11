// The gradients of attention, cut into spans of keys and shared out over threads.
#include <memory>
#include <new>

#include "engine.hpp"
#include "export.hpp"
#include "threads.hpp"

using namespace saccade;

namespace {

// How many steps each unit is through with. A unit waits for one that was taken before it, so somebody works on that one.
using Progress = std::atomic<int64_t>;

void wait(void* state, int64_t unit, int64_t step) {
  Progress& done = static_cast<Progress*>(state)[unit];
  for (int64_t seen = done.load(std::memory_order_acquire); seen < step; seen = done.load(std::memory_order_acquire))
    done.wait(seen, std::memory_order_acquire);
}

void pass(void* state, int64_t unit, int64_t step) {
  Progress& done = static_cast<Progress*>(state)[unit];
  done.store(step, std::memory_order_release);
  done.notify_all();
}

// Keys of a unit: enough to share the cost of fetching queries, of which a sparse layout's unit uses few keys each; but
// what it keeps should stay near the core, and there should be units for many threads. By the shape alone, never by the
// number of threads, for sums are in the order of spans.
int64_t span_of(const Attention& p) {
  int64_t span = (p.indptr ? 1024 : 256) / (p.dim + p.value_dim > 320 ? 2 : 1);
  while (span > 128 && p.batch * p.kv_heads * p.keys < (p.indptr ? 32 : 8) * span) span /= 2;
  if (!p.indptr) return span;
  return span > p.block_k ? span / p.block_k * p.block_k : p.block_k;
}

// Units find their entries by bisection, and address their scratch by what they find.
bool ascends(const Attention& p) {
  const int64_t rows = p.layout_batch * p.layout_heads * ((p.queries + p.block_q - 1) / p.block_q);
  bool right = true;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t entry = p.indptr[row] + 1; entry < p.indptr[row + 1]; ++entry) right &= p.indices[entry - 1] < p.indices[entry];
  return right;
}

}  // namespace

// 0, or 1 if memory ran out, or 2 if the layout's rows are out of order.
EXPORT int saccade_attend_backward(const AttentionBackward* p) {
  const Attention& f = p->forward;
  if (f.indptr && !ascends(f)) return 2;
  const int64_t chunk = 256, chunks = (f.queries + chunk - 1) / chunk;
  int failed = p->out.data && share_out(f.threads, f.batch * f.heads * chunks, 64, [=](int64_t number, char*) {
    const int64_t head = number / chunks, first = number % chunks * chunk;
    engine->backward_delta(*p, head / f.heads, head % f.heads, first, f.queries - first < chunk ? f.queries - first : chunk);
  });
  // Span by span and not head by head: units in succession are of different heads and do not wait for one another.
  const int64_t span = span_of(f), spans = (f.keys + span - 1) / span, heads = f.batch * f.kv_heads;
  std::unique_ptr<Progress[]> progress(new (std::nothrow) Progress[size_t(spans * heads)]());
  if (failed || !progress) return 1;
  const Turns turns = {progress.get(), wait, pass};
  return share_out(f.threads, spans * heads, engine->backward_scratch(*p, span), [&](int64_t unit, char* scratch) {
    const int64_t head = unit % heads, first = unit / heads * span;
    engine->backward(*p, scratch, turns, unit, unit - heads, head / f.kv_heads, head % f.kv_heads, first,
                     f.keys - first < span ? f.keys - first : span, span);
  });
}
