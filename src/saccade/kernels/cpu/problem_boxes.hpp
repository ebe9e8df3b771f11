// Attention within boxes of a grid, as Python hands it over (`saccade.kernels.cpu.boxes` mirrors it) and as it is cut up.
#pragma once
#include "problem.hpp"

namespace saccade {

// q [B, H, N, D], k [B, G, N, D], v [B, G, N, E]; the N tokens lie on a grid of three axes, row-major. The query at x sees
// the keys y with first[x_i] <= y_i <= last[x_i] and y_i % dilation == x_i % dilation along every axis i.
struct Boxes {
  int64_t batch, heads, kv_heads, dim, value_dim;
  int64_t size[3], dilation[3];
  const int32_t *first, *last;  // of the axes after `missing`, one after another; rising within a dilation's class
  int32_t storage, threads;
  Rows q, k, v;
  float* out;  // [B, H, N, E]
  float* lse;  // [B, H, N], natural logarithm
  float scale;
  const float *grad_out, *grad_lse;  // backward: [B, H, N, E], and [B, H, N] or null
  float* delta;                      // [B, H, N], written and read again
  float *dq, *dk, *dv;               // [B, H, N, D], [B, G, N, D], [B, G, N, E]
  int32_t across;                    // the lanes: 0 what is cheaper, 1 compact tiles, 2 rows
  int32_t missing;                   // leading axes of one token, which have no windows; 0 once inside the engine
};

// `count` tokens of an axis, start, start + dilation ..., side by side across the lanes; all they see is low .. high.
struct Strip {
  int32_t start, count, low, high;
};

// How the tokens of one side lie across the lanes: a tile is one strip of each axis.
struct Tiling {
  const int32_t *first[3], *last[3];  // of this side: what a query sees, or by whom a key is seen
  const Strip* strips[3];
  int64_t strip_count[3];
  int32_t shape[3];       // tokens of a tile along each axis; their product is the number of lanes
  int32_t at[3][16];      // place of each lane's token within its strip
  uint32_t lanes[3][16];  // lanes[i][c]: a bit for each lane whose token is the c-th of its strip on axis i
};

// The tokens of a grid that share their remainders along all axes: a grid without gaps. Its rows run along the last axis.
struct Sheet {
  int64_t start, step[3];  // number of its first token, and from neighbour to neighbour
  int64_t size[3];
  const int32_t *first[3], *last[3];  // of this side: what a query sees, or by whom a key is seen
};

// A unit of work on rows: of a sheet, the rows from .. to - 1 (counted over the first two axes), columns left .. right - 1.
struct SheetPart {
  Sheet sheet;
  int64_t from, to, left, right;
};

// What rows need room for, at most: the other side's planes and rows that a group of rows sees, and its columns that all
// columns of a part see, or one.
struct Room {
  int64_t planes, rows, columns, longest;
};

struct BoxesEngine {
  int64_t (*scratch)(const Boxes&);  // bytes per thread
  void (*forward)(const Boxes&, const Tiling&, char* scratch, int64_t b, int64_t h, int64_t tile);
  void (*backward_queries)(const Boxes&, const Tiling&, char* scratch, int64_t b, int64_t h, int64_t tile);
  void (*backward_keys)(const Boxes&, const Tiling&, char* scratch, int64_t b, int64_t g, int64_t tile);
};

// The same with a row of tokens across the lanes.
struct RowsEngine {
  int64_t group;                                 // rows that are worked on together
  int64_t (*scratch)(const Boxes&, const Room&);  // bytes per thread
  void (*forward)(const Boxes&, const Room&, const SheetPart&, char* scratch, int64_t b, int64_t h);
  void (*backward_queries)(const Boxes&, const Room&, const SheetPart&, char* scratch, int64_t b, int64_t h);
  void (*backward_keys)(const Boxes&, const Room&, const SheetPart&, char* scratch, int64_t b, int64_t g);
};

}  // namespace saccade
