#include "infer/padded_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/errors.h"

namespace deltafox::infer {
namespace {

using testing::ElementsAre;

const std::vector<std::int32_t> kIds{0, 1, 2, 3, 4, 5, 6, 7, 8};

TEST(PaddedBatch, PacksTheTokensOfEachRow) {
  const std::vector<std::uint8_t> mask{0, 1, 1, 1, 0, 0, 1, 1, 1};
  const PaddedBatch padded(kIds, mask, 3);
  EXPECT_THAT(padded.batch().input_ids, ElementsAre(1, 2, 3, 6, 7, 8));
  EXPECT_THAT(padded.batch().cu_seqlens, ElementsAre(0, 2, 3, 6));
  EXPECT_THAT(padded.places(), ElementsAre(1, 2, 3, 6, 7, 8));
  const std::vector<float> values{.0F, .1F, .2F, .3F, .4F, .5F, .6F, .7F, .8F};
  EXPECT_THAT(padded.pack(std::span(values)), ElementsAre(.1F, .2F, .3F, .6F, .7F, .8F));
}

TEST(PaddedBatch, WithoutAMaskEveryPlaceIsAToken) {
  const PaddedBatch padded(kIds, {}, 3);
  EXPECT_THAT(padded.batch().input_ids, testing::ElementsAreArray(kIds));
  EXPECT_THAT(padded.batch().cu_seqlens, ElementsAre(0, 3, 6, 9));
}

TEST(PaddedBatch, NamesTheRowOfAMaskItCannotTake) {
  const auto error_of = [](const std::vector<std::uint8_t>& mask) {
    return test::error_of([&] { const PaddedBatch padded(kIds, mask, 3, 10); });
  };
  EXPECT_THAT(error_of({1, 1, 1, 1, 0, 1, 1, 1, 1}), testing::HasSubstr("row 11"));
  EXPECT_THAT(error_of({1, 1, 1, 1, 1, 1, 0, 0, 0}), testing::HasSubstr("row 12"));
  EXPECT_THAT(error_of({1, 2, 1, 1, 1, 1, 1, 1, 1}), testing::HasSubstr("row 10"));
  EXPECT_EQ(error_of({1, 1, 0, 0, 1, 1, 0, 1, 0}), "no error");
}

}  // namespace
}  // namespace deltafox::infer
