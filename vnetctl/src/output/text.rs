//! Text for a terminal: what others named is escaped, times and sizes are short.
//!
//! Names come from hosts, guests' lookups and other people. A control character could move the
//! cursor or rewrite a line that was already read, and a bidirectional override can make a question
//! read as another one (Unicode UTR #36 §2.1, TR #9), so neither reaches the terminal as it is.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

/// The text with every character escaped that would act on a terminal rather than stand on it.
pub fn safe(text: &str) -> Cow<'_, str> {
    if !text.chars().any(acts) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\n' => escaped.push_str("\\n"),
            '\t' => escaped.push_str("\\t"),
            '\r' => escaped.push_str("\\r"),
            c if acts(c) => {
                let _ = write!(escaped, "\\u{{{:x}}}", u32::from(c));
            }
            c => escaped.push(c),
        }
    }
    Cow::Owned(escaped)
}

/// The same for a JSON text, where only strings can hold such characters: `\uXXXX` escapes leave
/// its value as it was (RFC 8259 §7).
pub(crate) fn safe_json(json: &str) -> Cow<'_, str> {
    // Line feeds and spaces between tokens are layout; inside strings the serializer escaped them.
    let hides = |c: char| c != '\n' && acts(c);
    if !json.chars().any(hides) {
        return Cow::Borrowed(json);
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if hides(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// Whether a character does something other than stand in its place: a control character, or one that
/// reorders, joins or hides its neighbours (Unicode's `Cf`, what is not shown, the separators of lines, and
/// the blanks that are not the ordinary space).
pub(crate) fn acts(c: char) -> bool {
    c.is_control()
        || (c.is_whitespace() && c != ' ')
        || matches!(c,
            // Soft hyphen, combining grapheme joiner.
            '\u{ad}' | '\u{34f}'
            // Arabic, Syriac, Khmer and Mongolian signs that are not shown; Hangul fillers.
            | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
            | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}' | '\u{3164}' | '\u{ffa0}'
            // Zero-width characters, directional marks, line and paragraph separators, embeddings
            // and overrides, invisible operators and isolates.
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            // Variation selectors, byte order mark, annotations; signs of notations; tags.
            | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}'
            | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// A span of time in its largest unit, as `45s`, `3m`, `7h`, `12d`.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..MINUTE => format!("{seconds}s"),
        MINUTE..HOUR => format!("{}m", seconds / MINUTE),
        HOUR..DAY => format!("{}h", seconds / HOUR),
        _ => format!("{}d", seconds / DAY),
    }
}

/// How long ago a time was; `-` where there is none. A time ahead of our clock was just now.
pub fn age(now: SystemTime, time: Option<&prost_types::Timestamp>) -> String {
    match time.and_then(|t| SystemTime::try_from(*t).ok()) {
        Some(time) => span(now.duration_since(time).unwrap_or_default()),
        None => NONE.to_owned(),
    }
}

/// How long until a time; `-` where there is none, `0s` once it has passed.
pub fn remaining(now: SystemTime, time: Option<&prost_types::Timestamp>) -> String {
    match time.and_then(|t| SystemTime::try_from(*t).ok()) {
        Some(time) => span(time.duration_since(now).unwrap_or_default()),
        None => NONE.to_owned(),
    }
}

/// A time to the second, RFC 3339 in UTC; `-` where there is none.
pub fn time(time: Option<&prost_types::Timestamp>) -> String {
    time.map_or_else(
        || NONE.to_owned(),
        |t| {
            prost_types::Timestamp {
                seconds: t.seconds,
                nanos: 0,
            }
            .to_string()
        },
    )
}

/// Bytes in the unit that leaves one to three digits before the point, as `17 B`, `1.2 MB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut tenths = count / 100;
    let mut unit = 0;
    while tenths >= 10_000 && unit + 1 < UNITS.len() {
        tenths /= 1000;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// The text, or `-` if it is empty.
pub fn or_none(text: impl Into<String>) -> String {
    let text = text.into();
    if text.is_empty() { NONE.to_owned() } else { text }
}

/// What stands where there is nothing.
pub const NONE: &str = "-";

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_act_on_a_terminal_are_escaped() {
        let cases = [
            ("plain-name.example", "plain-name.example"),
            ("b\u{fc}cher.example", "b\u{fc}cher.example"),
            ("a\u{1b}[31mred", "a\\u{1b}[31mred"),
            ("two\nlines\r\tend", "two\\nlines\\r\\tend"),
            ("safe\u{202e}gpj.exe", "safe\\u{202e}gpj.exe"),
            (
                "zero\u{200b}width\u{2066}x\u{2069}",
                "zero\\u{200b}width\\u{2066}x\\u{2069}",
            ),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            ("tag\u{e0041}", "tag\\u{e0041}"),
            (
                "b\u{fc}cher.example: \u{65e5}\u{672c} ok",
                "b\u{fc}cher.example: \u{65e5}\u{672c} ok",
            ),
            // What only one of two lists had, when there were two.
            ("a\u{34f}b\u{600}c\u{180b}d", "a\\u{34f}b\\u{600}c\\u{180b}d"),
            ("web\u{a0}ok\u{2003}\u{3000}x", "web\\u{a0}ok\\u{2003}\\u{3000}x"),
            ("n\u{1d173}\u{fff0}", "n\\u{1d173}\\u{fff0}"),
        ];

        for (text, expected) in cases {
            assert_eq!(safe(text), expected);
        }
    }

    #[test]
    fn escaped_json_means_the_same() {
        let value = serde_json::json!({"name": "a\u{202e}b\u{9b}c\u{e0041}\n"});
        let text = serde_json::to_string_pretty(&value).unwrap();

        let escaped = safe_json(&text);

        assert!(!escaped.chars().any(|c| c != '\n' && acts(c)), "{escaped}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&escaped).unwrap(),
            value
        );
    }

    #[test]
    fn spans_have_one_unit() {
        let cases = [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (3599, "59m"),
            (3600, "1h"),
            (86_399, "23h"),
            (864_000, "10d"),
        ];

        for (seconds, expected) in cases {
            assert_eq!(span(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn an_age_ahead_of_our_clock_is_now() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 0 };

        assert_eq!(age(now, Some(&at(2000))), "0s");
        assert_eq!(age(now, Some(&at(820))), "3m");
        assert_eq!(age(now, None), "-");
        assert_eq!(remaining(now, Some(&at(1012))), "12s");
        assert_eq!(remaining(now, Some(&at(900))), "0s");
    }

    #[test]
    fn bytes_have_few_digits() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (1_250_000, "1.2 MB"),
            (999_999_999, "999.9 MB"),
            (u64::MAX, "18446.7 PB"),
        ];

        for (count, expected) in cases {
            assert_eq!(bytes(count), expected);
        }
    }
}
