// Tokens of PTX text.
#pragma once

#include <string>

#include "module.h"

namespace dsv4::sim {

struct Token {
  enum Kind : uint8_t { name, dot, number, text, mark, end } kind = end;
  std::string s;  // dot: without the leading dot
  uint32_t line = 0;
  bool glued = false;  // no white space before it
};

class Lexer {
 public:
  explicit Lexer(const std::string& source) : source_(source) { next(); }
  const Token& peek() const { return token_; }
  Token next();
  bool at(const char* mark) const { return token_.kind == Token::mark && token_.s == mark; }
  bool at_dot(const char* word) const { return token_.kind == Token::dot && token_.s == word; }
  bool accept(const char* mark);
  void expect(const char* mark);
  [[noreturn]] void wrong(const std::string& what) const;

 private:
  void skip_blank();
  const std::string& source_;
  size_t at_ = 0;
  uint32_t line_ = 1;
  Token token_;
};

// A numeric literal: integers (with U), 0f and 0d bit patterns, decimal reals.
struct Number {
  bool real = false;
  int bits = 64;
  uint64_t value = 0;
};
Number number_of(const Token& token, const Lexer& lexer);

}  // namespace dsv4::sim
