// Reads JSON: what a manifest and the header of a safetensors file are written in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace graphopt {

// One sentence that says what is wrong and what to do.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  enum Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  static Json parse(std::string_view text, const std::string& where) {
    Reader reader{text, where, 0};
    Json value = reader.value(0);
    reader.skip();
    if (reader.at != text.size()) reader.fail("there is more than one value");
    return value;
  }

  Kind kind() const { return kind_; }
  bool null() const { return kind_ == kNull; }
  const std::string& string() const { return need(kString, "a string"), text_; }
  const std::vector<Json>& items() const { return need(kArray, "a list"), items_; }
  const std::vector<std::pair<std::string, Json>>& fields() const { return need(kObject, "an object"), fields_; }

  int64_t whole() const {
    need(kNumber, "a number");
    char* end = nullptr;
    int64_t value = std::strtoll(text_.c_str(), &end, 10);
    if (*end) throw Error("a manifest is damaged: " + text_.substr(0, 40) + " should be a whole number; get it again");
    return value;
  }

  double number() const {
    if (kind_ == kBool) return text_ == "true";
    return need(kNumber, "a number"), std::strtod(text_.c_str(), nullptr);
  }

  // The field of that name, or null where there is none.
  const Json& operator[](std::string_view name) const {
    static const Json none;
    for (const auto& field : fields())
      if (field.first == name) return field.second;
    return none;
  }

 private:
  struct Reader {
    static constexpr int kDeepest = 64;
    std::string_view text;
    const std::string& where;
    size_t at;

    [[noreturn]] void fail(const std::string& why) const {
      throw Error(where + " is damaged (" + why + "); get the artifact again or compile it again");
    }
    void skip() {
      while (at < text.size() && std::string_view(" \t\r\n").find(text[at]) != std::string_view::npos) ++at;
    }
    bool take(char expected) {
      skip();
      if (at >= text.size() || text[at] != expected) return false;
      return ++at, true;
    }
    void expect(char expected) {
      if (!take(expected)) fail(std::string("'") + expected + "' is missing");
    }

    Json value(int depth) {
      if (depth > kDeepest) fail("it is nested too deeply");
      skip();
      if (at >= text.size()) fail("it ends too early");
      Json json;
      switch (text[at]) {
        case '{':
          return object(depth);
        case '[':
          return array(depth);
        case '"':
          json.kind_ = kString;
          json.text_ = string();
          return json;
        default:
          return word();
      }
    }

    Json object(int depth) {
      Json json;
      json.kind_ = kObject;
      expect('{');
      if (take('}')) return json;
      do {
        skip();
        std::string name = string();
        expect(':');
        json.fields_.emplace_back(std::move(name), value(depth + 1));
      } while (take(','));
      expect('}');
      return json;
    }

    Json array(int depth) {
      Json json;
      json.kind_ = kArray;
      expect('[');
      if (take(']')) return json;
      do json.items_.push_back(value(depth + 1));
      while (take(','));
      expect(']');
      return json;
    }

    Json word() {
      size_t begin = at;
      while (at < text.size() && std::string_view(",]} \t\r\n").find(text[at]) == std::string_view::npos) ++at;
      Json json;
      json.text_ = std::string(text.substr(begin, at - begin));
      if (json.text_ == "null") return json;
      char* end = nullptr;
      std::strtod(json.text_.c_str(), &end);
      json.kind_ = json.text_ == "true" || json.text_ == "false" ? kBool : kNumber;
      if (json.kind_ == kNumber && (*end || json.text_.empty())) fail("'" + json.text_.substr(0, 40) + "' is no value");
      return json;
    }

    std::string string() {
      expect('"');
      std::string found;
      while (at < text.size() && text[at] != '"') {
        if (text[at] != '\\') {
          found += text[at++];
          continue;
        }
        if (at + 1 >= text.size()) fail("a string does not end");
        escaped(found, text[at + 1]);
      }
      expect('"');
      return found;
    }

    void escaped(std::string& found, char letter) {
      static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
      at += 2;
      if (size_t index = kFrom.find(letter); index != std::string_view::npos) {
        found += kTo[index];
        return;
      }
      if (letter != 'u') fail("a string has an unknown escape");
      uint32_t code = unit();
      if (code >= 0xD800 && code < 0xDC00) {
        if (text.substr(at, 2) != "\\u") fail("a string has half of a character");
        at += 2;
        code = 0x10000 + ((code - 0xD800) << 10) + ((unit() - 0xDC00) & 0x3FF);
      }
      append_utf8(found, code);
    }

    uint32_t unit() {
      if (at + 4 > text.size()) fail("a string does not end");
      uint32_t code = static_cast<uint32_t>(std::strtoul(std::string(text.substr(at, 4)).c_str(), nullptr, 16));
      at += 4;
      return code;
    }

    static void append_utf8(std::string& found, uint32_t code) {
      int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
      static constexpr uint32_t kFirst[] = {0, 0xC0, 0xE0, 0xF0};
      found += static_cast<char>(kFirst[more] | code >> 6 * more);
      while (more--) found += static_cast<char>(0x80 | (code >> 6 * more & 0x3F));
    }
  };

  void need(Kind kind, const char* what) const {
    if (kind_ != kind) throw Error(std::string("an artifact is damaged: ") + what + " is missing; get it again");
  }

  Kind kind_ = kNull;
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> fields_;
};

}  // namespace graphopt
