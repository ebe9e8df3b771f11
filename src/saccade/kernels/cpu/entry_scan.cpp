// Linear attention, cut into heads, or where these are too few for the threads, into spans of tokens. A span's first state is
// computed by the same sums either way, so that the cut changes no bit.
#include "engine.hpp"
#include "export.hpp"
#include "pages.hpp"
#include "threads.hpp"

using namespace saccade;

namespace {

int step(const Scan* p) {
  int64_t heads = p->batch * p->states, work = heads * p->dim * p->value_dim * (p->sets + 1);
  return share_out(work < 65536 ? 1 : p->threads, heads, 0, [=](int64_t head, char*) { engine->scan.step(*p, head); });
}

// Calls part(head, from, to, memory) for all rows of all heads' states, each head's rows cut so that all threads have some.
template <class Part>
int over_rows(const Scan& p, int64_t rows, int64_t scratch, const Part& part) {
  int64_t heads = p.batch * p.states, blocks = rows / engine->scan.block, parts = (p.threads + heads - 1) / heads;
  if (parts > blocks) parts = blocks;
  return share_out(p.threads, heads * parts, scratch, [&](int64_t number, char* memory) {
    int64_t head = number / parts, i = number % parts, block = engine->scan.block;
    part(head, blocks * i / parts * block, blocks * (i + 1) / parts * block, memory);
  });
}

bool few_heads(const Scan& p) { return p.batch * p.states < p.threads && p.tokens >= 2 * engine->scan.span; }

int64_t spans_of(const Scan& p) { return (p.tokens + engine->scan.span - 1) / engine->scan.span; }

float* floats(int64_t count) { return static_cast<float*>(std::malloc(size_t(count + 1) * sizeof(float))); }

int forward(const Scan& p) {
  const ScanEngine& scan = engine->scan;
  int64_t heads = p.batch * p.states, scratch = scan.scratch(p);
  if (!few_heads(p))
    return share_out(p.threads, heads, scratch, [&](int64_t head, char* memory) { scan.head(p, memory, head); });
  int64_t spans = spans_of(p), step = (spans - 1) * scan.state(p);
  float* kept = floats(heads * step);
  if (!kept) return 1;
  int failed = over_rows(p, scan.rows(p), scratch, [&](int64_t head, int64_t from, int64_t to, char* memory) {
    scan.states(p, memory, head, from, to, kept + head * step);
  });
  failed = failed || share_out(p.threads, heads * spans, scratch, [&](int64_t number, char* memory) {
    scan.run(p, memory, number / spans, number % spans, kept + number / spans * step);
  });
  std::free(kept);
  return failed;
}

int backward_over_spans(const ScanGradient& g, float* kept, float* adjoints) {
  const ScanEngine& scan = engine->scan;
  const Scan& p = g.scan;
  int64_t scratch = scan.gradient_scratch(g), spans = spans_of(p), heads = p.batch * p.states;
  int64_t step = (spans - 1) * scan.turned_state(p), adjoint_step = (spans - 1) * scan.state(p);
  return over_rows(p, scan.turned_rows(p), scratch, [&](int64_t head, int64_t from, int64_t to, char* memory) {
    scan.gradient_states(g, memory, head, from, to, kept + head * step);
  }) || over_rows(p, scan.rows(p), scratch, [&](int64_t head, int64_t from, int64_t to, char* memory) {
    scan.gradient_adjoints(g, memory, head, from, to, adjoints + head * adjoint_step);
  }) || share_out(p.threads, heads * spans, scratch, [&](int64_t number, char* memory) {
    int64_t head = number / spans;
    scan.gradient_run(g, memory, head, number % spans, kept + head * step, adjoints + head * adjoint_step);
  });
}

int backward(const ScanGradient& g) {
  const ScanEngine& scan = engine->scan;
  const Scan& p = g.scan;
  int64_t heads = p.batch * p.states, kept_spans = heads * (spans_of(p) - 1), step = (spans_of(p) - 1) * scan.turned_state(p);
  float* kept = floats(kept_spans * scan.turned_state(p));
  float* adjoints = floats(few_heads(p) ? kept_spans * scan.state(p) : 0);
  int failed = !kept || !adjoints;
  if (!failed && few_heads(p)) {
    failed = backward_over_spans(g, kept, adjoints);
  } else if (!failed) {
    failed = share_out(p.threads, heads, scan.gradient_scratch(g), [&](int64_t head, char* memory) {
      scan.gradient_head(g, memory, head, kept + head * step);
    });
  }
  std::free(kept);
  std::free(adjoints);
  return failed;
}

}  // namespace

// 0, or 1 if memory ran out.
EXPORT int saccade_scan(const Scan* p) {
  if (p->tokens == 1) return step(p);
  const int64_t element = p->storage == FP32 ? 4 : 2, rows = p->batch * p->states * p->tokens;
  expect_writing(p->out, rows * p->sets * p->value_dim * element);
  return forward(*p);
}

EXPORT int saccade_scan_gradient(const ScanGradient* g) {
  const Scan& p = g->scan;
  const int64_t element = p.storage == FP32 ? 4 : 2, rows = p.batch * p.states * p.tokens;
  expect_writing(g->dq, rows * p.sets * p.dim * element);
  expect_writing(g->dk, rows * p.dim * element);
  expect_writing(g->dv, rows * p.value_dim * element);
  return backward(*g);
}
