// Continues a prompt, printing the text as it comes: hello MODEL PROMPT
#include <deltafox/error.h>
#include <deltafox/generate.h>

#include <iostream>

int main(int argc, char** argv) try {
  if (argc != 3) throw deltafox::Error("usage: hello MODEL PROMPT");
  const auto model = deltafox::Model::load(argv[1]);
  const auto tokenizer = deltafox::Tokenizer::load(model.info().directory);
  const std::vector<std::vector<std::int32_t>> prompts{tokenizer.encode(argv[2])};
  deltafox::GenerateOptions options;
  options.tokenizer = &tokenizer;
  options.on_token = [](const deltafox::TokenEvent& event) {
    std::cout << event.text << std::flush;
    return true;
  };
  deltafox::generate(model, prompts, {.max_new_tokens = 32}, options);
  std::cout << '\n';
} catch (const deltafox::Error& error) {
  std::cerr << error.what() << '\n';
  return 2;
}
