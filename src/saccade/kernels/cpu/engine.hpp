// The table of functions that each instruction set provides.
#pragma once
#include "problem.hpp"
#include "problem_backward.hpp"
#include "problem_boxes.hpp"
#include "problem_scan.hpp"
#include "problem_decode.hpp"
#include "problem_gather.hpp"
#include "problem_groups.hpp"
#include "problem_search.hpp"

namespace saccade {

struct ScanEngine {
  int64_t span;                                 // tokens between the states that are kept when heads alone keep not all busy
  int64_t (*rows)(const Scan&);                 // rows of a state, of which phase one takes any part, in multiples of `block`
  int64_t block;
  int64_t (*state)(const Scan&);                // floats of a state
  int64_t (*scratch)(const Scan&);              // bytes per thread
  void (*head)(const Scan&, char* scratch, int64_t head);
  // The states before each span but the first, on rows from .. to - 1; then a span that starts from its own.
  void (*states)(const Scan&, char* scratch, int64_t head, int64_t from, int64_t to, float* kept);
  void (*run)(const Scan&, char* scratch, int64_t head, int64_t span, const float* kept);
  void (*step)(const Scan&, int64_t head);
  // Backward: transposed states and their rows; a whole head; or the states before and the adjoints after each span, then spans.
  int64_t (*turned_rows)(const Scan&);
  int64_t (*turned_state)(const Scan&);
  int64_t (*gradient_scratch)(const ScanGradient&);
  void (*gradient_head)(const ScanGradient&, char* scratch, int64_t head, float* kept);
  void (*gradient_states)(const ScanGradient&, char* scratch, int64_t head, int64_t from, int64_t to, float* kept);
  void (*gradient_adjoints)(const ScanGradient&, char* scratch, int64_t head, int64_t from, int64_t to, float* kept);
  void (*gradient_run)(const ScanGradient&, char* scratch, int64_t head, int64_t span, const float* kept, const float* adjoints);
};

struct Engine {
  const char* name;
  int lanes;
  int64_t attend_unit;                                            // queries of a unit, at most
  int64_t (*attend_scratch)(const Attention&);                    // bytes per thread
  void (*attend)(const Attention&, char* scratch, int64_t b, int64_t h, int64_t first, int64_t count);
  void (*backward_delta)(const AttentionBackward&, int64_t b, int64_t h, int64_t first, int64_t count);
  int64_t (*backward_scratch)(const AttentionBackward&, int64_t span);  // bytes per thread
  void (*backward)(const AttentionBackward&, char* scratch, const Turns&, int64_t unit, int64_t before, int64_t b, int64_t g,
                   int64_t first, int64_t count, int64_t span);
  ScanEngine scan;
  BoxesEngine boxes;
  RowsEngine box_rows;
  GatherEngine gather;
  int64_t decode_rows;                                            // queries of a unit, at most
  int64_t (*decode_scratch)(const Decode&, int64_t rows);         // bytes per thread
  int64_t (*decode_partial)(const Decode&, int64_t rows);         // floats of a unit's result
  // `following`: what the thread does next, or null.
  void (*decode)(const Decode&, const Part&, const Part* following, char* scratch, float* partial);
  void (*decode_join)(const Decode&, const Part&, const float* partials, int64_t partial_size, int64_t parts);
  int64_t (*score_scratch)(const Decode&);                        // bytes per thread
  void (*decode_scores)(const Decode&, char* scratch, int64_t b, int64_t g, int64_t start, int64_t end);
  int64_t (*group_scratch)(const Groups&);                        // bytes per thread
  void (*attend_groups)(const Groups&, char* scratch, int64_t b, int64_t g, int64_t start, int64_t end, int64_t cut);
  int64_t (*search_scratch)(const Search&);                       // bytes per thread
  void (*search)(const Search&, char* scratch, int64_t b, int64_t h);
};

extern const Engine* engine;  // in use

// Null where this build has no such instruction set.
const Engine* engine_avx512_bf16();
const Engine* engine_avx512();
const Engine* engine_avx2();
const Engine* engine_portable();

}  // namespace saccade
