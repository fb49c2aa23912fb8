// A reader of JSON text (RFC 8259), strict: valid UTF-8, no name twice in an object, limited depth.
#ifndef MULTIFIRE_JSON_H
#define MULTIFIRE_JSON_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <locale>
#include <sstream>
#include <string>
#include <vector>

#include "failure.h"

namespace multifire_engine_impl {

struct Json {
  enum Kind { kNull, kFalse, kTrue, kNumber, kString, kArray, kObject };
  Kind kind = kNull;
  std::string text;                // a string's characters in UTF-8, or a number as it is written
  std::vector<std::string> names;  // of an object, in its order
  std::vector<Json> items;         // of an array or an object

  const Json* find(const std::string& name) const {
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) return &items[i];
    return nullptr;
  }
};

inline bool is_digit(char c) { return c >= '0' && c <= '9'; }

inline std::string shown(const Json& json) { return json.text.empty() ? "another kind of value" : json.text; }

// The value of a number; strtod is not used, because it depends on the program's locale.
inline double number_of(const Json& json, const std::string& name = "") {
  std::istringstream stream(json.text);
  stream.imbue(std::locale::classic());
  double value = 0;
  stream >> value;
  if (json.kind != Json::kNumber || stream.fail() || !std::isfinite(value))
    fail(name + "found " + shown(json) + ", expected a finite number");
  return value;
}

// An integer from 0 to `largest`.
inline int64_t integer_of(const Json& json, int64_t largest, const std::string& name = "") {
  const bool digits = json.kind == Json::kNumber && std::all_of(json.text.begin(), json.text.end(), is_digit);
  if (!digits || json.text.size() > 18) fail(name + "found " + shown(json) + ", expected an integer");
  int64_t value = 0;
  for (char c : json.text) value = 10 * value + (c - '0');
  if (value > largest) fail(name + "found " + json.text + ", expected at most " + std::to_string(largest));
  return value;
}

class JsonReader {
 public:
  explicit JsonReader(const char* begin, const char* end) : at_(begin), end_(end) {}

  Json read() {
    Json value = this->value(0);
    skip_space();
    require(at_ == end_, "its header is followed by other text");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 32;

  char peek() const { return at_ < end_ ? *at_ : '\0'; }
  char next() {
    require(at_ < end_, "its JSON text ends early");
    return *at_++;
  }
  void skip_space() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
  }
  void expect(char c) { require(next() == c, "its JSON text is malformed"); }
  void word(const char* letters) {
    for (; *letters; ++letters) expect(*letters);
  }

  Json value(int depth) {
    require(depth < kMaxDepth, "its JSON text is nested too deeply");
    skip_space();
    Json json;
    switch (peek()) {
      case '{':
        object(json, depth);
        break;
      case '[':
        array(json, depth);
        break;
      case '"':
        json.kind = Json::kString;
        json.text = string();
        break;
      case 't':
        word("true");
        json.kind = Json::kTrue;
        break;
      case 'f':
        word("false");
        json.kind = Json::kFalse;
        break;
      case 'n':
        word("null");
        break;
      default:
        number(json);
    }
    return json;
  }

  void object(Json& json, int depth) {
    json.kind = Json::kObject;
    ++at_;
    skip_space();
    if (peek() == '}') {
      ++at_;
      return;
    }
    do {
      skip_space();
      json.names.push_back(string());
      skip_space();
      expect(':');
      json.items.push_back(value(depth + 1));
      skip_space();
    } while (comma('}'));
    std::vector<std::string> sorted = json.names;
    std::sort(sorted.begin(), sorted.end());
    require(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "its JSON text has a name twice");
  }

  void array(Json& json, int depth) {
    json.kind = Json::kArray;
    ++at_;
    skip_space();
    if (peek() == ']') {
      ++at_;
      return;
    }
    do {
      json.items.push_back(value(depth + 1));
      skip_space();
    } while (comma(']'));
  }

  // Reads a comma (true) or the closing bracket (false).
  bool comma(char close) {
    const char c = next();
    require(c == ',' || c == close, "its JSON text is malformed");
    return c == ',';
  }

  void digits() {
    require(is_digit(peek()), "its JSON text is malformed");
    while (is_digit(peek())) ++at_;
  }

  void number(Json& json) {
    const char* begin = at_;
    if (peek() == '-') ++at_;
    digits();
    if (peek() == '.') {
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    json.kind = Json::kNumber;
    json.text.assign(begin, at_);
    require(json.text.size() < 64, "its JSON text has a number that is too long");
  }

  std::string string() {
    expect('"');
    std::string text;
    for (char c = next(); c != '"'; c = next()) {
      require(static_cast<unsigned char>(c) >= 0x20, "its JSON text is malformed");
      if (c == '\\')
        escape(text);
      else if (static_cast<unsigned char>(c) >= 0x80)
        multibyte(text, static_cast<unsigned char>(c));
      else
        text += c;
    }
    return text;
  }

  void escape(std::string& text) {
    const char c = next();
    switch (c) {
      case '"':
      case '\\':
      case '/':
        text += c;
        break;
      case 'b':
        text += '\b';
        break;
      case 'f':
        text += '\f';
        break;
      case 'n':
        text += '\n';
        break;
      case 'r':
        text += '\r';
        break;
      case 't':
        text += '\t';
        break;
      case 'u':
        append(text, code_point());
        break;
      default:
        fail("its JSON text is malformed");
    }
  }

  uint32_t hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next();
      const int digit = is_digit(c)            ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      require(digit >= 0, "its JSON text is malformed");
      value = value << 4 | static_cast<uint32_t>(digit);
    }
    return value;
  }

  uint32_t code_point() {
    const uint32_t high = hex4();
    if (high < 0xd800 || high > 0xdfff) return high;
    word("\\u");
    const uint32_t low = hex4();
    require(high < 0xdc00 && low >= 0xdc00 && low <= 0xdfff, "its JSON text is malformed");
    return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
  }

  static void append(std::string& text, uint32_t point) {
    const auto tail = [&](int shift) { text += static_cast<char>(0x80 | ((point >> shift) & 0x3f)); };
    if (point < 0x80) {
      text += static_cast<char>(point);
      return;
    }
    if (point < 0x800) {
      text += static_cast<char>(0xc0 | point >> 6);
      tail(0);
      return;
    }
    if (point < 0x10000) {
      text += static_cast<char>(0xe0 | point >> 12);
      tail(6);
      tail(0);
      return;
    }
    text += static_cast<char>(0xf0 | point >> 18);
    tail(12);
    tail(6);
    tail(0);
  }

  void multibyte(std::string& text, unsigned char first) {
    const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
    uint32_t point = first & (0x3fu >> more);
    for (int i = 0; i < more; ++i) {
      const auto c = static_cast<unsigned char>(next());
      require((c & 0xc0) == 0x80, "its JSON text is not UTF-8");
      point = point << 6 | (c & 0x3f);
    }
    static const uint32_t kSmallest[4] = {0, 0x80, 0x800, 0x10000};
    const bool valid = first >= 0xc2 && first <= 0xf4 && point >= kSmallest[more] && point < 0x110000 &&
                       (point < 0xd800 || point > 0xdfff);
    require(valid, "its JSON text is not UTF-8");
    append(text, point);
  }

  const char* at_;
  const char* end_;
};

inline Json read_json(const std::string& text) { return JsonReader(text.data(), text.data() + text.size()).read(); }

}  // namespace multifire_engine_impl

#endif
