// Sequences of one launch, small enough to travel as a kernel parameter: nothing is uploaded, and a
// captured graph keeps its own copy. Longer lists are launched in parts.
#pragma once

namespace deltafox::cuda {

// The mixers that work in chunks have so many rows a chunk; a sequence's chunks begin at its first.
constexpr int kChunkRows = 64;
constexpr int chunks_of(int rows) {
  return (rows + kChunkRows - 1) / kChunkRows;
}

struct BatchEntry {
  float* state;     // of this sequence
  int begin;        // its first row
  int length;       // its rows
  int segments;     // parts it is cut into
  int first_block;  // parts of the entries before it
  int first_map;    // parts of the entries before it, the last part of each left out
  int first_chunk;  // chunks of the entries before it
};

struct SequenceBatch {
  static constexpr int kLimit = 100;
  int count = 0;
  int blocks = 0;  // parts of all entries
  int maps = 0;    // parts of all entries, the last of each left out
  int chunks = 0;  // of all entries
  BatchEntry entries[kLimit];

  void add(float* state, int begin, int length, int segments) {
    entries[count++] = {state, begin, length, segments, blocks, maps, chunks};
    blocks += segments;
    maps += segments - 1;
    chunks += chunks_of(length);
  }
};

}  // namespace deltafox::cuda
