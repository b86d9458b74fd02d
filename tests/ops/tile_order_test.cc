#include "ops/tile_order.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/float_convert.h"
#include "ops/linear.h"
#include "support/random.h"

namespace deltafox {
namespace {

using test::Random;

Tensor random_bf16(Random& random, const Shape& shape) {
  Tensor w(DType::kBF16, shape);
  convert(random.normal_tensor(shape).view(), w.view());
  return w;
}

std::vector<std::uint16_t> bits(const Tensor& w) {
  const auto* const from = static_cast<const std::uint16_t*>(w.view().data);
  return {from, from + w.view().shape.size()};
}

ConstTensorView tiles_of(const Tensor& w) {
  return {w.view().data, DType::kBF16Tiles, w.view().shape};
}

TEST(TileOrder, IsThatOfSixteenRowsBy32Columns) {
  ThreadPool threads(2);
  Context ctx(threads);
  constexpr std::int64_t kRows = 19;
  constexpr std::int64_t kColumns = 64;
  Tensor w(DType::kBF16, {kRows, kColumns});
  auto* const elements = static_cast<std::uint16_t*>(w.view().data);
  for (std::uint16_t i = 0; i < kRows * kColumns; ++i) elements[i] = i;
  const std::vector<std::uint16_t> before = bits(w);
  ops::arrange_in_tiles(ctx, w.view());
  const std::vector<std::uint16_t> tiles = bits(w);
  std::size_t at = 0;
  for (const auto& [row, count] : {std::pair(0, 16), std::pair(16, 3)}) {
    for (int column = 0; column < kColumns; column += 32) {
      for (int r = row; r < row + count; ++r) {
        for (int c = column; c < column + 32; ++c) ASSERT_EQ(tiles[at++], r * kColumns + c);
      }
    }
  }
  std::vector<std::uint16_t> back(before.size());
  ops::copy_from_tiles(tiles_of(w), back.data());
  EXPECT_EQ(back, before);
}

TEST(TileOrder, ProductsAreThoseOfTheRowsToTheBit) {
  Random random(1);
  ThreadPool threads(3);
  Context ctx(threads);
  if (!ops::prefers_tiles(ctx, {16, 32})) GTEST_SKIP() << "this processor has no use for tiles";
  for (const std::int64_t tokens : {1, 2, 15, 16, 17, 40, 65}) {
    for (const std::int64_t rows : {1, 16, 31, 33, 209}) {
      const std::int64_t depth = 32 * random.integer(1, 40);
      const Tensor x = random.normal_tensor({tokens, depth});
      Tensor w = random_bf16(random, {rows, depth});
      Tensor expected = random.normal_tensor({tokens, rows});
      Tensor y = expected;
      const bool accumulate = rows % 2 == 0;
      ops::linear(ctx, {x.view(), w.view(), expected.view(), accumulate});
      ops::arrange_in_tiles(ctx, w.view());
      ops::linear(ctx, {x.view(), tiles_of(w), y.view(), accumulate});
      for (std::int64_t i = 0; i < tokens * rows; ++i) {
        ASSERT_EQ(y.f32()[i], expected.f32()[i])
            << "T " << tokens << " N " << rows << " K " << depth;
      }
    }
  }
}

}  // namespace
}  // namespace deltafox
