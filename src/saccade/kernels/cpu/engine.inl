// The whole engine for one instruction set; an isa_*.cpp says which.
#include "attend.hpp"
#include "engine.hpp"

namespace saccade::SACCADE_ISA {

static int64_t attend_scratch(const Attention& p) { return lay_out(p, nullptr, nullptr); }

static void attend(const Attention& p, char* memory, int64_t b, int64_t h, int64_t first, int64_t count) {
  Scratch scratch;
  lay_out(p, &scratch, memory);
  Unit(p, scratch, b, h, first, count).run();
}

static const Engine ENGINE = {
    .name = SACCADE_NAME,
    .lanes = LANES,
    .attend_unit = UNIT,
    .attend_scratch = attend_scratch,
    .attend = attend,
};

}  // namespace saccade::SACCADE_ISA
