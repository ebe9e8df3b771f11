// The table of functions that each instruction set provides.
#pragma once
#include "problem.hpp"

namespace saccade {

struct Engine {
  const char* name;
  int lanes;
  int64_t attend_unit;                                            // queries of a unit, at most
  int64_t (*attend_scratch)(const Attention&);                    // bytes per thread
  void (*attend)(const Attention&, char* scratch, int64_t b, int64_t h, int64_t first, int64_t count);
};

extern const Engine* engine;  // in use

// Null where this build has no such instruction set.
const Engine* engine_avx512_bf16();
const Engine* engine_avx512();
const Engine* engine_avx2();
const Engine* engine_portable();

}  // namespace saccade
