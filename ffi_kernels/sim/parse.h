// The parser of PTX text into statements; decode.h turns statements into executable instructions.
#pragma once

#include <map>
#include <tuple>

#include "lex.h"

namespace dsv4::sim {

class Parser {
 public:
  Parser(const std::string& text, Module& module) : lexer_(text), module_(module) {}
  void parse();

 private:
  struct Scope {
    int parent;
    std::map<std::string, int> registers;
    std::map<std::string, int> counted;        // prefix -> first register of name<N>
    std::map<std::string, int> counts;
    std::map<std::string, Variable> variables;
    std::map<std::string, int> labels;         // statement index
    std::map<std::string, std::vector<std::string>> targets;  // .branchtargets
  };
  void declaration(bool external);
  Variable variable(Space space, std::vector<uint8_t>* data);
  void function(bool entry, bool external);
  void formals(Function& f, std::vector<Variable>& into, bool kernel);
  void limits(Function& f);
  void body(Function& f);
  void statement(Function& f);
  void directive(Function& f);
  void registers(Function& f);
  void location();
  Arg operand(Function& f, int depth = 0);
  Arg memory(Function& f, int depth);
  int find_register(Function& f, const std::string& name, bool must);
  void resolve(Function& f);
  void skip_section();
  int add_register(Function& f, const std::string& name, Type type);

  Lexer lexer_;
  Module& module_;
  std::vector<Scope> scopes_;
  int scope_ = -1;
  Location loc_;
  std::map<std::tuple<uint32_t, uint32_t, uint32_t>, std::tuple<uint32_t, uint32_t, uint32_t>> inlined_;
  size_t budget_ = 0;  // registers and bytes declared, bounded against absurd text
};

void decode_module(Module& module);  // decode.cpp

}  // namespace dsv4::sim
