// What `scan` gives to the table of functions.
#pragma once
#include "engine.hpp"
#include "scan_backward.hpp"

namespace saccade::SACCADE_ISA {

// One thread's chunks of one state of the problem.
struct ScanWork {
  Chunks chunks;
  float* state;

  ScanWork(const Scan& p, char* memory, int64_t head) : chunks(p) {
    state = chunks.lay_out(reinterpret_cast<float*>(memory));
    chunks.b = head / p.states;
    chunks.s = head % p.states;
  }

  void run(int64_t from, int64_t to) {
    for (int64_t chunk = from; chunk < to; ++chunk) {
      chunks.enter(chunk);
      chunks.run_chunk(state);
    }
  }
};

static int64_t last_span(const Chunks& c) { return (c.chunks() - 1) / SPAN; }

static int64_t scan_scratch(const Scan& p) {
  char* origin = reinterpret_cast<char*>(64);
  ScanWork work(p, origin, 0);
  return reinterpret_cast<char*>(work.state + work.chunks.state_size()) - origin;
}

static void scan_head(const Scan& p, char* memory, int64_t head) {
  ScanWork work(p, memory, head);
  work.chunks.load_state(p.start, work.state);
  work.run(0, work.chunks.chunks());
  work.chunks.save_state(work.state, p.last);
}

static void scan_states(const Scan& p, char* memory, int64_t head, int64_t from, int64_t to, float* kept) {
  ScanWork work(p, memory, head);
  Chunks& c = work.chunks;
  c.load_state(p.start, work.state);
  for (int64_t chunk = 0; chunk < last_span(c) * SPAN; ++chunk) {
    c.enter(chunk);
    c.read_keys();
    c.read_values();
    c.decay_to_end(c.k);
    c.move_state(work.state, from, to);
    if ((chunk + 1) % SPAN) continue;
    for (int64_t column = 0; column < c.value_wide; column += PANEL)
      for (int64_t i = from * PANEL; i < to * PANEL; ++i)
        kept[chunk / SPAN * c.state_size() + column * c.tall + i] = work.state[column * c.tall + i];
  }
}

static void scan_run(const Scan& p, char* memory, int64_t head, int64_t span, const float* kept) {
  ScanWork work(p, memory, head);
  Chunks& c = work.chunks;
  if (span == 0) {
    c.load_state(p.start, work.state);
  } else {
    for (int64_t i = 0; i < c.state_size(); ++i) work.state[i] = kept[(span - 1) * c.state_size() + i];
  }
  int64_t to = (span + 1) * SPAN;
  bool last = to >= c.chunks();
  work.run(span * SPAN, last ? c.chunks() : to);
  if (last) c.save_state(work.state, p.last);
}

struct BackwardWork {
  Backward chunks;

  BackwardWork(const ScanGradient& p, char* memory, int64_t head) : chunks(p) {
    chunks.lay_out(reinterpret_cast<float*>(memory));
    chunks.b = head / p.scan.states;
    chunks.s = head % p.scan.states;
  }
};

static int64_t gradient_scratch(const ScanGradient& p) {
  char* origin = reinterpret_cast<char*>(64);
  return reinterpret_cast<char*>(Backward(p).lay_out(reinterpret_cast<float*>(origin))) - origin;
}

static void gradient_states(const ScanGradient& p, char* memory, int64_t head, int64_t from, int64_t to, float* kept) {
  BackwardWork work(p, memory, head);
  Backward& c = work.chunks;
  const int64_t size = c.turned_state_size();
  c.load_turned(c.states);
  for (int64_t chunk = 0; chunk < last_span(c) * SPAN; ++chunk) {
    c.enter(chunk);
    c.move_turned(c.states, c.states, from, to);
    if ((chunk + 1) % SPAN) continue;
    for (int64_t column = 0; column < c.wide; column += PANEL)
      for (int64_t i = from * PANEL; i < to * PANEL; ++i)
        kept[chunk / SPAN * size + column * c.value_tall + i] = c.states[column * c.value_tall + i];
  }
}

static void gradient_adjoints(const ScanGradient& p, char* memory, int64_t head, int64_t from, int64_t to, float* kept) {
  BackwardWork work(p, memory, head);
  Backward& c = work.chunks;
  c.load_state(p.dlast, c.adjoint);
  for (int64_t chunk = c.chunks() - 1; chunk >= SPAN; --chunk) {
    c.enter(chunk);
    for (int64_t set = 0; set < p.scan.sets; ++set) {
      c.read_queries(set);
      c.read_dout(set);
      c.move_adjoint(set, from, to);
    }
    if (chunk % SPAN) continue;
    for (int64_t column = 0; column < c.value_wide; column += PANEL)
      for (int64_t i = from * PANEL; i < to * PANEL; ++i)
        kept[(chunk / SPAN - 1) * c.state_size() + column * c.tall + i] = c.adjoint[column * c.tall + i];
  }
}

// One span; the adjoint of the state after it is in the scratch.
static void gradient_span(Backward& c, int64_t span, const float* kept) {
  const int64_t size = c.turned_state_size(), from = span * SPAN, to = from + SPAN < c.chunks() ? from + SPAN : c.chunks();
  if (span == 0) {
    c.load_turned(c.states);
  } else {
    for (int64_t i = 0; i < size; ++i) c.states[i] = kept[(span - 1) * size + i];
  }
  for (int64_t chunk = from; chunk + 1 < to; ++chunk) {
    float* before = c.states + (chunk - from) * size;
    c.enter(chunk);
    c.move_turned(before, before + size, 0, c.value_tall);
  }
  for (int64_t chunk = to - 1; chunk >= from; --chunk) {
    c.enter(chunk);
    c.run_chunk(c.states + (chunk - from) * size);
  }
  if (span == 0) c.save_state(c.adjoint, c.gradient.dstart);
}

static void gradient_run(const ScanGradient& p, char* memory, int64_t head, int64_t span, const float* kept,
                         const float* adjoints) {
  BackwardWork work(p, memory, head);
  Backward& c = work.chunks;
  if ((span + 1) * SPAN >= c.chunks()) {
    c.load_state(p.dlast, c.adjoint);
  } else {
    for (int64_t i = 0; i < c.state_size(); ++i) c.adjoint[i] = adjoints[span * c.state_size() + i];
  }
  gradient_span(c, span, kept);
}

static void gradient_head(const ScanGradient& p, char* memory, int64_t head, float* kept) {
  BackwardWork work(p, memory, head);
  Backward& c = work.chunks;
  gradient_states(p, memory, head, 0, c.value_tall, kept);
  c.load_state(p.dlast, c.adjoint);
  for (int64_t span = last_span(c); span >= 0; --span) gradient_span(c, span, kept);
}

static const ScanEngine SCAN = {
    .span = SPAN * CHUNK,
    .rows = [](const Scan& p) { return round_up(p.dim, LANES); },
    .block = BLOCK,
    .state = [](const Scan& p) { return Chunks(p).state_size(); },
    .scratch = scan_scratch,
    .head = scan_head,
    .states = scan_states,
    .run = scan_run,
    .step = [](const Scan& p, int64_t head) { scan_step(p, head / p.states, head % p.states); },
    .turned_rows = [](const Scan& p) { return round_up(p.value_dim, LANES); },
    .turned_state = [](const Scan& p) { return Chunks(p).turned_state_size(); },
    .gradient_scratch = gradient_scratch,
    .gradient_head = gradient_head,
    .gradient_states = gradient_states,
    .gradient_adjoints = gradient_adjoints,
    .gradient_run = gradient_run,
};

}  // namespace saccade::SACCADE_ISA
