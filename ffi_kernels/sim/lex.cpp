// Lexer of PTX text: names, dotted words (directives, modifiers), numbers, strings and marks, each with its line.
#include "lex.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

namespace dsv4::sim {
namespace {
bool starts_name(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }
bool in_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }
}  // namespace

void Lexer::wrong(const std::string& what) const {
  fail("PTX line %u: %s, but found '%s'.", token_.line, what.c_str(), token_.s.substr(0, 60).c_str());
}

void Lexer::skip_blank() {
  const std::string& s = source_;
  while (at_ < s.size()) {
    if (s[at_] == '\n') { ++line_; ++at_; }
    else if (s[at_] == ' ' || s[at_] == '\t' || s[at_] == '\r' || s[at_] == '\f') ++at_;
    else if (s.compare(at_, 2, "//") == 0) while (at_ < s.size() && s[at_] != '\n') ++at_;
    else if (s.compare(at_, 2, "/*") == 0) {
      for (at_ += 2; at_ < s.size() && s.compare(at_, 2, "*/") != 0; ++at_) line_ += s[at_] == '\n';
      at_ = std::min(s.size(), at_ + 2);
    } else break;
  }
}

Token Lexer::next() {
  Token before = std::move(token_);
  const size_t start_blank = at_;
  skip_blank();
  const std::string& s = source_;
  token_ = Token();
  token_.line = line_;
  token_.glued = at_ == start_blank;
  if (at_ >= s.size()) return before;
  const size_t start = at_;
  const char c = s[at_];
  if (starts_name(c)) {
    for (++at_; at_ < s.size() && in_name(s[at_]); ++at_) {}
    token_.kind = Token::name;
    token_.s = s.substr(start, at_ - start);
  } else if (c == '.' && at_ + 1 < s.size() && in_name(s[at_ + 1])) {
    for (++at_; at_ < s.size(); ++at_) {
      if (in_name(s[at_])) continue;
      if (s.compare(at_, 2, "::") == 0 && at_ + 2 < s.size() && in_name(s[at_ + 2])) ++at_;
      else break;
    }
    token_.kind = Token::dot;
    token_.s = s.substr(start + 1, at_ - start - 1);
  } else if (std::isdigit(static_cast<unsigned char>(c))) {
    const bool plain = !(c == '0' && at_ + 1 < s.size() && std::strchr("xXfFdDbB", s[at_ + 1]));
    for (++at_; at_ < s.size(); ++at_) {
      if (std::isalnum(static_cast<unsigned char>(s[at_]))) continue;
      if (plain && s[at_] == '.') continue;
      if (plain && (s[at_] == '+' || s[at_] == '-') && (s[at_ - 1] == 'e' || s[at_ - 1] == 'E')) continue;
      break;
    }
    token_.kind = Token::number;
    token_.s = s.substr(start, at_ - start);
  } else if (c == '"') {
    for (++at_; at_ < s.size() && s[at_] != '"'; ++at_) line_ += s[at_] == '\n';
    token_.kind = Token::text;
    token_.s = s.substr(start + 1, at_ - start - 1);
    if (at_ < s.size()) ++at_;
  } else {
    ++at_;
    token_.kind = Token::mark;
    token_.s = std::string(1, c);
  }
  return before;
}

bool Lexer::accept(const char* mark) {
  if (!at(mark)) return false;
  next();
  return true;
}

void Lexer::expect(const char* mark) {
  if (!accept(mark)) wrong(std::string("'") + mark + "' was expected");
}

Number number_of(const Token& token, const Lexer& lexer) {
  const std::string& s = token.s;
  Number n;
  const char kind = s.size() > 1 && s[0] == '0' ? static_cast<char>(std::tolower(static_cast<unsigned char>(s[1]))) : 0;
  char* rest = nullptr;
  if (kind == 'f' || kind == 'd') {
    n.real = true;
    n.bits = kind == 'f' ? 32 : 64;
    if (s.size() != static_cast<size_t>(2 + n.bits / 4)) lexer.wrong("a real constant has " + std::to_string(n.bits / 4) + " hex digits");
    n.value = std::strtoull(s.c_str() + 2, &rest, 16);
  } else if (kind == 'x') n.value = std::strtoull(s.c_str() + 2, &rest, 16);
  else if (kind == 'b') n.value = std::strtoull(s.c_str() + 2, &rest, 2);
  else if (s.find_first_of(".eE") != std::string::npos) {
    n.real = true;
    const double v = std::strtod(s.c_str(), &rest);
    std::memcpy(&n.value, &v, 8);
  } else n.value = std::strtoull(s.c_str(), &rest, kind ? 8 : 10);
  if (rest && *rest == 'U' && !n.real) ++rest;
  if (!rest || *rest) lexer.wrong("'" + s.substr(0, 40) + "' is no number");
  return n;
}

}  // namespace dsv4::sim
