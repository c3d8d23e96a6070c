//! JSON as gvproxy reads and writes it, which is as Go's `encoding/json` does: the keys of objects are compared
//! without case, unknown ones are passed over, what follows the first value is not looked at, `null` sets nothing,
//! and what is wrong is told in that decoder's words.
//!
//! A value is read by `serde_json`; only what it refuses is looked at again ([`scan`]), for the words.

mod scan;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// A value, with the keys of objects in the order in which they stand.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool,
    /// A whole number that fits.
    Integer(i64),
    /// Any other number.
    Number(f64),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// An object.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Reads the first value of a body.
    ///
    /// # Errors
    /// What Go's decoder says.
    pub(super) fn read(body: &[u8]) -> Result<Self, String> {
        // Inside of a string Go takes what is no UTF-8 as U+FFFD; elsewhere that is as wrong as what it stands for.
        let text = without_lone_surrogates(String::from_utf8_lossy(body));
        let mut values = serde_json::Deserializer::from_str(&text).into_iter::<Json>();
        match values.next() {
            Some(Ok(value)) => Ok(value),
            Some(Err(_)) | None => Err(scan::problem(text.as_bytes())),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "bool",
            Self::Integer(_) | Self::Number(_) => "number",
            Self::Text(_) => "string",
            Self::List(_) => "array",
            Self::Object(_) => "object",
        }
    }
}

/// Puts `\ufffd` in the place of each `\u` that is half of a character without the other half, as Go reads
/// it.
fn without_lone_surrogates(mut text: Cow<'_, str>) -> Cow<'_, str> {
    let mut at = 0;
    while let Some(found) = text.get(at..).and_then(|rest| rest.find('\\')) {
        at += found;
        let bytes = text.as_bytes();
        let Some(unit) = utf16_unit(bytes, at) else {
            // What is escaped, which may be a backslash, is passed over whole.
            at += 1 + text[at + 1..].chars().next().map_or(0, char::len_utf8);
            continue;
        };
        let next = utf16_unit(bytes, at + UNIT_BYTES);
        match (unit, next) {
            (0xd800..=0xdbff, Some(0xdc00..=0xdfff)) => at += 2 * UNIT_BYTES,
            (0xd800..=0xdfff, _) => {
                text.to_mut().replace_range(at..at + UNIT_BYTES, "\\ufffd");
                at += UNIT_BYTES;
            }
            _ => at += UNIT_BYTES,
        }
    }
    text
}

/// Bytes of `\uXXXX`.
const UNIT_BYTES: usize = 6;

/// The unit that `\uXXXX` stands for, if that stands there.
fn utf16_unit(bytes: &[u8], at: usize) -> Option<u16> {
    let digits = bytes.get(at..at + UNIT_BYTES)?.strip_prefix(b"\\u")?;
    let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
    let digits = std::str::from_utf8(digits).ok().filter(|_| is_hex)?;
    u16::from_str_radix(digits, 16).ok()
}

/// An object of a request, by the name that its Go type has: `ExposeRequest`.
pub(super) struct Object<'a> {
    /// The type's name, and the path to this object in it.
    path: String,
    fields: &'a [(String, Json)],
}

impl<'a> Object<'a> {
    /// The value as an object of a type; `null` is one without fields.
    ///
    /// # Errors
    /// What Go's decoder says of any other kind.
    pub(super) fn of(value: &'a Json, name: &str) -> Result<Self, String> {
        let fields = match value {
            Json::Object(fields) => fields.as_slice(),
            Json::Null => &[],
            other => {
                return Err(format!(
                    "json: cannot unmarshal {} into Go value of type types.{name}",
                    other.kind()
                ));
            }
        };
        let path = name.to_owned();
        Ok(Self { path, fields })
    }

    /// A text; empty where it is not given. Of several the last counts.
    ///
    /// # Errors
    /// What Go's decoder says of a value of another kind.
    pub(super) fn text(&self, field: &str) -> Result<String, String> {
        self.text_as(field, "string")
    }

    /// The same, of what Go reads into another type.
    ///
    /// # Errors
    /// As [`Object::text`].
    pub(super) fn text_as(&self, field: &str, kind: &str) -> Result<String, String> {
        let mut text = String::new();
        for value in self.values(field) {
            match value {
                Json::Null => {}
                Json::Text(value) => text.clone_from(value),
                other => return Err(self.mismatch(other, field, kind)),
            }
        }
        Ok(text)
    }

    /// A whole number; 0 where it is not given.
    ///
    /// # Errors
    /// As [`Object::text`].
    pub(super) fn integer(&self, field: &str) -> Result<i64, String> {
        let mut number = 0;
        for value in self.values(field) {
            match value {
                Json::Null => {}
                Json::Integer(value) => number = *value,
                other => return Err(self.mismatch(other, field, "int")),
            }
        }
        Ok(number)
    }

    /// An object inside; one without fields where it is not given.
    ///
    /// # Errors
    /// As [`Object::text`].
    pub(super) fn object(&self, field: &str, kind: &str) -> Result<Object<'a>, String> {
        let mut fields: &[(String, Json)] = &[];
        for value in self.values(field) {
            match value {
                Json::Null => {}
                Json::Object(value) => fields = value,
                other => return Err(self.mismatch(other, field, kind)),
            }
        }
        let path = format!("{}.{field}", self.path);
        Ok(Object { path, fields })
    }

    /// A list of objects; none where it is not given.
    ///
    /// # Errors
    /// As [`Object::text`].
    pub(super) fn list(&self, field: &str, kind: &str) -> Result<Vec<Object<'a>>, String> {
        let mut list: &[Json] = &[];
        for value in self.values(field) {
            match value {
                Json::Null => list = &[],
                Json::List(value) => list = value,
                other => return Err(self.mismatch(other, field, &format!("[]{kind}"))),
            }
        }
        list.iter()
            .map(|value| {
                let fields = match value {
                    Json::Object(fields) => fields.as_slice(),
                    Json::Null => &[],
                    other => return Err(self.mismatch(other, field, kind)),
                };
                let path = format!("{}.{field}", self.path);
                Ok(Object { path, fields })
            })
            .collect()
    }

    fn values(&self, field: &str) -> impl Iterator<Item = &'a Json> {
        self.fields
            .iter()
            .filter(move |(key, _)| key.eq_ignore_ascii_case(field))
            .map(|(_, value)| value)
    }

    fn mismatch(&self, found: &Json, field: &str, expected: &str) -> String {
        format!(
            "json: cannot unmarshal {} into Go struct field {}.{field} of type {expected}",
            found.kind(),
            self.path
        )
    }
}

/// A value as Go's encoder writes it: on one line that ends, with what a browser may take for markup escaped.
pub(super) fn write(value: &impl Serialize) -> String {
    let mut text = line(value);
    text.push('\n');
    text
}

/// The same without an end.
pub(super) fn line(value: &impl Serialize) -> String {
    // What is written here has text for keys, and so can always be.
    let json = serde_json::to_string(value).unwrap_or_default();
    // Outside of strings none of these stands in JSON.
    let mut text = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        match c {
            '<' => text.push_str("\\u003c"),
            '>' => text.push_str("\\u003e"),
            '&' => text.push_str("\\u0026"),
            '\u{2028}' => text.push_str("\\u2028"),
            '\u{2029}' => text.push_str("\\u2029"),
            c => text.push(c),
        }
    }
    text
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Json, E> {
        Ok(Json::Bool)
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Integer(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(i64::try_from(value).map_or(Json::Number(value as f64), Json::Integer))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(Json::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
        let mut fields = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            fields.push(entry);
        }
        Ok(Json::Object(fields))
    }
}
