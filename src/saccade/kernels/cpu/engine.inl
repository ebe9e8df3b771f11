// The whole engine for one instruction set; an isa_*.cpp says which.
#include "attend.hpp"
#include "backward.hpp"
#include "box_rows.hpp"
#include "boxes.hpp"
#include "decode.hpp"
#include "decode_scores.hpp"
#include "engine.hpp"
#include "gather.hpp"
#include "groups.hpp"
#include "scan_engine.hpp"
#include "search.hpp"

namespace saccade::SACCADE_ISA {

static int64_t attend_scratch(const Attention& p) { return lay_out(p, nullptr, nullptr); }

static void attend(const Attention& p, char* memory, int64_t b, int64_t h, int64_t first, int64_t count) {
  Scratch scratch;
  lay_out(p, &scratch, memory);
  Unit(p, scratch, b, h, first, count).run();
}

static int64_t backward_scratch(const AttentionBackward& p, int64_t span) {
  BackwardScratch<Pairs> pairs;
  BackwardScratch<Single> single;
  return backward_paired(p.forward) ? pairs.lay_out(p.forward, span, nullptr) : single.lay_out(p.forward, span, nullptr);
}

static void backward(const AttentionBackward& p, char* memory, const Turns& turns, int64_t unit, int64_t before, int64_t b,
                     int64_t g, int64_t first, int64_t count, int64_t span) {
  auto run = backward_paired(p.forward) ? backward_unit<Pairs> : backward_unit<Single>;
  run(p, memory, turns, unit, before, b, g, first, count, span);
}

static int64_t decode_scratch(const Decode& p, int64_t rows) {
  return works_in_pairs(p) ? Stream<HalfPairs>::lay_out(p, rows, nullptr, nullptr)
                           : Stream<Floats>::lay_out(p, rows, nullptr, nullptr);
}

static int64_t decode_partial(const Decode& p, int64_t rows) { return (rows * (padded(p.a.value_dim) + 2) + 15) / 16 * 16; }

static void decode(const Decode& p, const Part& part, const Part* following, char* memory, float* partial) {
  if (works_in_pairs(p))
    Stream<HalfPairs>(p, part, memory, partial).run(following);
  else
    Stream<Floats>(p, part, memory, partial).run(following);
}

static const Engine ENGINE = {
    .name = SACCADE_NAME,
    .lanes = LANES,
    .attend_unit = UNIT,
    .attend_scratch = attend_scratch,
    .attend = attend,
    .backward_delta = backward_delta,
    .backward_scratch = backward_scratch,
    .backward = backward,
    .scan = SCAN,
    .boxes = BOXES,
    .box_rows = BOX_ROWS,
    .gather = GATHER,
    .decode_rows = ROWS,
    .decode_scratch = decode_scratch,
    .decode_partial = decode_partial,
    .decode = decode,
    .decode_join = join,
    .score_scratch = score_scratch,
    .decode_scores = decode_scores,
    .group_scratch = group_scratch,
    .attend_groups = attend_groups,
    .search_scratch = search_scratch,
    .search = search,
};

}  // namespace saccade::SACCADE_ISA
