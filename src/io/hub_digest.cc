#include "io/hub_digest.h"

#include <openssl/evp.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <system_error>
#include <vector>

#include "core/error.h"

namespace deltafox::hub {

std::string file_digest(const std::string& path, DigestKind kind,
                        const std::function<void()>& tick) {
  constexpr std::size_t kBlock = std::size_t{1} << 20;
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(),
                                                                        &EVP_MD_CTX_free);
  const std::unique_ptr<std::FILE, decltype(&std::fclose)> file(std::fopen(path.c_str(), "rb"),
                                                                &std::fclose);
  if (file == nullptr) fail("{}: cannot read: {}", path, std::generic_category().message(errno));
  const EVP_MD* algorithm = kind == DigestKind::kSha256 ? EVP_sha256() : EVP_sha1();
  bool ok = context != nullptr && EVP_DigestInit_ex(context.get(), algorithm, nullptr) == 1;
  if (ok && kind == DigestKind::kGitBlob) {
    // Git hashes a header before the bytes; its terminating zero belongs to it.
    std::error_code error;
    const std::string header = fmt::format("blob {}", std::filesystem::file_size(path, error));
    if (error) fail("{}: cannot read: {}", path, error.message());
    ok = EVP_DigestUpdate(context.get(), header.c_str(), header.size() + 1) == 1;
  }
  std::vector<unsigned char> block(kBlock);
  while (ok) {
    tick();
    const std::size_t count = std::fread(block.data(), 1, block.size(), file.get());
    if (count == 0) break;
    ok = EVP_DigestUpdate(context.get(), block.data(), count) == 1;
  }
  if (std::ferror(file.get()) != 0)
    fail("{}: cannot read: {}", path, std::generic_category().message(errno));
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  if (!ok || EVP_DigestFinal_ex(context.get(), digest.data(), &length) != 1)
    fail("{}: OpenSSL cannot compute the {} digest", path, EVP_MD_get0_name(algorithm));
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) hex += fmt::format("{:02x}", digest[i]);
  return hex;
}

}  // namespace deltafox::hub
