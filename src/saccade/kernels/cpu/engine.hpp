// The table of functions that each instruction set provides.
#pragma once
#include "problem.hpp"
#include "problem_backward.hpp"

namespace saccade {

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
};

extern const Engine* engine;  // in use

// Null where this build has no such instruction set.
const Engine* engine_avx512_bf16();
const Engine* engine_avx512();
const Engine* engine_avx2();
const Engine* engine_portable();

}  // namespace saccade
