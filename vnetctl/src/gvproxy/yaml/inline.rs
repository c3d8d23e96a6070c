//! Policy text out of the middle of the configuration file, so that the policy's own reader reads it and its messages
//! name the right line and column.

use super::tree::{self, Node, Value};
use crate::gvproxy::origin::{Given, Origin};

/// The text of a mapping, as a document of its own: where it stands in the file, with nothing before and after it.
/// `None` where it cannot be read apart from the rest, because it uses an anchor from elsewhere.
pub(super) fn mapping(document: &str, node: &Node) -> Option<String> {
    let start = node.offset?;
    let rest = document.get(start..)?;
    let length = if rest.starts_with('{') {
        flow_length(rest)?
    } else {
        block_length(rest, indentation(document, start))
    };
    let text = format!(
        "{}{}\n",
        blank(document.get(..start)?),
        rest.get(..length)?.trim_end()
    );
    // Whatever the cut missed would change what the policy says.
    let read = tree::load(&text).ok()?;
    read.says_the_same_as(node).then_some(text)
}

/// A policy with `outboundAllow` alone, each expression in the line in which it stands in the file.
pub(super) fn outbound_allow(expressions: &[Given<String>]) -> String {
    let mut text = "{version: 1, outboundAllow: [".to_owned();
    let (mut line, mut column) = (1, text.len());
    for (index, given) in expressions.iter().enumerate() {
        let separator = if index == 0 { "" } else { "," };
        text.push_str(separator);
        column += separator.len();
        if let Origin::Key { place, .. } = &given.from {
            let place_line = usize::try_from(place.line).unwrap_or(1);
            let place_column = usize::try_from(place.column).unwrap_or(1);
            while line < place_line {
                text.push('\n');
                (line, column) = (line + 1, 0);
            }
            while column + 1 < place_column {
                text.push(' ');
                column += 1;
            }
        }
        // A string of JSON is one of YAML.
        let quoted = serde_json::Value::from(given.value.as_str()).to_string();
        column += quoted.chars().count();
        text.push_str(&quoted);
    }
    text.push_str("]}\n");
    text
}

/// As many lines and columns, of nothing.
fn blank(before: &str) -> String {
    let line = before.rsplit('\n').next().unwrap_or_default();
    let mark = |c: char| if c == '\u{feff}' { "" } else { " " };
    let lines = "\n".repeat(before.matches('\n').count());
    lines + &line.chars().map(mark).collect::<String>()
}

/// Characters before a node in its line.
fn indentation(document: &str, start: usize) -> usize {
    let line = document[..start].rsplit('\n').next().unwrap_or_default();
    line.chars().count()
}

/// Up to the first line that stands further left.
fn block_length(rest: &str, indentation: usize) -> usize {
    let mut length = 0;
    for (index, line) in rest.split_inclusive('\n').enumerate() {
        let spaces = line.chars().take_while(|c| *c == ' ').count();
        let said = line.trim();
        let is_outside = spaces < indentation && !said.is_empty() && !said.starts_with('#');
        if index > 0 && is_outside {
            break;
        }
        length += line.len();
    }
    length
}

/// Up to the brace that closes the first one.
fn flow_length(rest: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut quote = None;
    let mut before = '{';
    let mut characters = rest.char_indices();
    while let Some((at, c)) = characters.next() {
        match (quote, c) {
            (Some('"'), '\\') => {
                characters.next();
            }
            // A doubled one closes and opens again.
            (Some(open), c) if open == c => quote = None,
            (Some(_), _) => {}
            // Inside a word it is a letter.
            (None, '"' | '\'') if matches!(before, '{' | '[' | ',' | ':' | '\'' | '"') => quote = Some(c),
            (None, '#') if rest[..at].ends_with(char::is_whitespace) => {
                let line = rest[at..].find('\n')?;
                while characters.next()?.0 < at + line {}
            }
            (None, '{' | '[') => depth += 1,
            (None, '}' | ']') => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + c.len_utf8());
                }
            }
            (None, _) => {}
        }
        if !c.is_whitespace() {
            before = c;
        }
    }
    None
}

/// Whether a policy says nothing, which must not be taken for a policy.
pub(super) fn is_empty(node: &Node) -> bool {
    match &node.value {
        Value::Null => true,
        Value::Map(entries) => entries.is_empty(),
        _ => false,
    }
}
