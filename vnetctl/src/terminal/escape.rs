//! Showing text that a guest chose: nothing in it may move the cursor, change colours, or look like
//! something else.

use std::fmt::Write;

/// The same text with everything that a terminal would act upon, or hide, spelt out.
pub fn escape(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_plain(character) {
            shown.push(character);
        } else {
            // Writing to a String does not fail.
            let _ = write!(shown, "{}", character.escape_unicode());
        }
    }
    shown
}

/// Neither a control character nor one that reorders, joins or hides its neighbours (Unicode's `Cf`, the
/// separators of lines, and the blanks that are not the ordinary space).
fn is_plain(character: char) -> bool {
    !(character.is_control()
        || (character.is_whitespace() && character != ' ')
        || matches!(character,
            '\u{ad}'
            | '\u{34f}'
            | '\u{600}'..='\u{605}'
            | '\u{61c}'
            | '\u{6dd}'
            | '\u{70f}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_acts_upon_is_left() {
        let hostile = "a\u{1b}[2Jb\r\nc\u{9b}31md\u{202e}gpj\u{200b}\u{7f}\t";
        let shown = escape(hostile);
        assert!(shown.chars().all(|c| !c.is_control()), "{shown:?}");
        assert_eq!(
            shown,
            "a\\u{1b}[2Jb\\u{d}\\u{a}c\\u{9b}31md\\u{202e}gpj\\u{200b}\\u{7f}\\u{9}"
        );
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        assert_eq!(escape("bücher.example: 日本 ok"), "bücher.example: 日本 ok");
    }
}
