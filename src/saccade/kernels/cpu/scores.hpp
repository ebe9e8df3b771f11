// What a score is beside scale * q.k, and which pairs have one: shared by the passes forward and backward.
#pragma once
#include "problem.hpp"
#include "tile.hpp"

namespace saccade::SACCADE_ISA {

constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

// The scores of one head. Panels of queries begin at query `from` and lie across the lanes: scores [keys][PANEL].
class Scores {
 public:
  Scores(const Attention& problem, int64_t b, int64_t h) : p(problem), b(b), h(h) {}

  // Keys that a query sees by the band.
  int64_t lowest(int64_t i) const { return p.left < 0 ? 0 : clamp(i + p.keys - p.queries - p.left); }
  int64_t highest(int64_t i) const { return p.right < 0 ? p.keys - 1 : clamp(i + p.keys - p.queries + p.right + 1) - 1; }

  // A bias may hide any pair.
  bool sees_all(int64_t from, int64_t rows, int64_t start, int keys, const uint8_t* bits) const {
    return !bits && !p.q_segments && !p.bias && start >= lowest(from + rows - 1) && start + keys - 1 <= highest(from);
  }

  bool sees_nothing(int64_t from, int64_t rows, int64_t start, int keys) const {
    return start > highest(from + rows - 1) || start + keys - 1 < lowest(from);
  }

  // q.k becomes what softmax wants: scaled, capped, lowered by distance, biased. `slopes`, if given, receives the
  // cap's derivative.
  void transform(int64_t from, int64_t rows, int64_t start, int keys, float* scores, float* slopes) const {
    const float* bias = p.bias;
    if (bias) bias += b * p.bias_stride[0] + h * p.bias_stride[1];
    vf lane;
    for (int i = 0; i < LANES; ++i) lane[i] = float(i);
    for (int j = 0; j < keys; ++j)
      for (int half = 0; half < 2; ++half) {
        float* place = scores + j * PANEL + half * LANES;
        vf x = load(place) * p.scale;
        if (p.softcap > 0) {  // tanh(y) = 1 - 2 / (exp(2y) + 1), which is right at both ends
          vf e = exp2v(x * (2 * LOG2E / p.softcap) > 120.0f ? splat(120.0f) : x * (2 * LOG2E / p.softcap));
          vf small = x / p.softcap;
          vf odd = small - small * small * small / 3.0f;
          vf magnitude = small < 0.0f ? -small : small;
          vf tanh = magnitude < 0.01f ? odd : 1.0f - 2.0f / (e + 1.0f);
          if (slopes) store(slopes + j * PANEL + half * LANES, 1.0f - tanh * tanh);
          x = p.softcap * tanh;
        }
        if (p.alibi) {
          vf distance = lane + float(from + half * LANES + p.keys - p.queries - start - j);
          x -= p.alibi[h] * (distance < 0.0f ? -distance : distance);
        }
        if (bias)
          for (int i = 0; i < LANES; ++i)
            if (half * LANES + i < rows)
              x[i] = biased(x[i], bias[(from + half * LANES + i) * p.bias_stride[2] + (start + j) * p.bias_stride[3]]);
        store(place, x);
      }
  }

  // Hides what the band, the layout's bits (of a block whose first key is `origin`) and the segments hide.
  void mask(int64_t from, int64_t start, int keys, int64_t origin, const uint8_t* bits, float* scores) const {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int half = 0; half < 2; ++half) {
      int64_t query = from + half * LANES, offset = p.keys - p.queries;
      vi segment = {}, seen = {};
      if (p.q_segments)
        for (int i = 0; i < LANES; ++i)
          segment[i] = query + i < p.queries ? p.q_segments[b * p.q_segment_stride + query + i] : -1;
      for (int j = 0; j < keys; ++j) {
        float* place = scores + j * PANEL + half * LANES;
        vf x = load(place);
        // j visible if key - offset - right <= query <= key - offset + left; bounds relative to the first lane
        if (p.right >= 0) x = lane >= near(start + j - offset - p.right - query) ? x : splat(-INF);
        if (p.left >= 0) x = lane <= near(start + j - offset + p.left - query) ? x : splat(-INF);
        if (bits) {
          if (j % 8 == 0) seen = eight_bits(bits, query % p.block_q, start + j - origin);
          x = ((seen >> (j % 8)) & 1) != 0 ? x : splat(-INF);
        }
        if (p.q_segments) {
          vi other = splat(p.kv_segments[b * p.kv_segment_stride + start + j]);
          x = ((segment == other) & (segment >= 0)) != 0 ? x : splat(-INF);
        }
        store(place, x);
      }
    }
  }

 private:
  const Attention& p;
  const int64_t b, h;

  static float biased(float score, float bias) { return bias == -INF ? -INF : score + bias; }  // -inf hides NaN too
  int64_t clamp(int64_t key) const { return key < 0 ? 0 : key > p.keys ? p.keys : key; }
  static int32_t near(int64_t x) { return int32_t(x < -1 ? -1 : x > LANES ? LANES : x); }

  // Bits of keys `key` .. key + 7 of a block, lowest first, for the queries of a vector, whose first is `query` of it.
  vi eight_bits(const uint8_t* bits, int64_t query, int64_t key) const {
    vi found = {};
    int64_t bytes = (p.block_q * p.block_k + 7) / 8;
    for (int i = 0; i < LANES && query + i < p.block_q; ++i) {
      int64_t bit = (query + i) * p.block_k + key, byte = bit >> 3;
      int32_t word = bits[byte] | (byte + 1 < bytes ? bits[byte + 1] << 8 : 0);
      found[i] = word >> (bit & 7);
    }
    return found;
  }
};

}  // namespace saccade::SACCADE_ISA
