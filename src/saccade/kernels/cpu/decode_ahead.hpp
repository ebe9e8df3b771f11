// Asking for rows before they are needed.
#pragma once
#include "simd.hpp"

namespace saccade::SACCADE_ISA {

// What memory should bring while other rows are worked on: the values of a tile while its scores are taken, the next keys
// while its values are weighed. Rows are asked for evenly, since memory takes a bounded queue of lines, and in the order of
// their addresses, which the machine's own prefetchers continue. They are brought to the second cache: the queue of the first
// is shorter, and what waits there keeps loads waiting.
class Ahead {
 public:
  Ahead() = default;
  // All rows have been asked for after so many steps.
  Ahead(const char* const* rows, int count, int64_t bytes, int64_t steps)
      : rows(rows), bytes(bytes), count(count), rate(steps ? int((count * UNIT + steps - 1) / steps) : 0) {}

  __attribute__((always_inline)) void step() {
    for (due += rate; due >= UNIT && done < count; due -= UNIT, ++done) {
      const char* row = rows[done];
      // GCC drops functions that only prefetch unless it is told to inline them.
      for (const char* at = row - (reinterpret_cast<uintptr_t>(row) & 63); at < row + bytes; at += 64)
        __builtin_prefetch(at, 0, 2);
    }
  }

 private:
  static constexpr int UNIT = 256;
  const char* const* rows = nullptr;
  int64_t bytes = 0;
  int count = 0, rate = 0, due = 0, done = 0;
};

}  // namespace saccade::SACCADE_ISA
