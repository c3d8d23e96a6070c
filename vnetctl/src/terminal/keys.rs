//! What a key press looks like in the bytes of a terminal in raw mode.

/// A key that answers a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A character.
    Char(char),
    /// Return.
    Enter,
    /// Escape alone.
    Escape,
    /// Control-C.
    Interrupt,
    /// Control-D.
    EndOfFile,
    /// Control-Z.
    Suspend,
    /// Anything else: a cursor key, a function key, another control character.
    Other,
}

/// The first key of what was read at once, and how many bytes it took. `None` for nothing.
///
/// An escape sequence arrives whole, and is taken whole: a cursor key is not an escape and a letter.
pub(crate) fn first_key(bytes: &[u8]) -> Option<(Key, usize)> {
    let key = match *bytes.first()? {
        b'\r' | b'\n' => Key::Enter,
        0x03 => Key::Interrupt,
        0x04 => Key::EndOfFile,
        0x1a => Key::Suspend,
        0x1b if bytes.len() == 1 => Key::Escape,
        0x1b => return Some((Key::Other, bytes.len())),
        byte if byte.is_ascii_control() => Key::Other,
        byte => {
            let length = match byte {
                0xf0.. => 4,
                0xe0.. => 3,
                0xc0.. => 2,
                _ => 1,
            };
            let end = length.min(bytes.len());
            let character = std::str::from_utf8(&bytes[..end])
                .ok()
                .and_then(|text| text.chars().next());
            return Some((character.map_or(Key::Other, Key::Char), end));
        }
    };
    Some((key, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_told_apart() {
        assert_eq!(first_key(b""), None);
        assert_eq!(first_key(b"yn"), Some((Key::Char('y'), 1)));
        assert_eq!(first_key("ä!".as_bytes()), Some((Key::Char('ä'), 2)));
        assert_eq!(first_key(b"\x1b"), Some((Key::Escape, 1)));
        assert_eq!(first_key(b"\x1b[A"), Some((Key::Other, 3)));
        assert_eq!(first_key(b"\x03"), Some((Key::Interrupt, 1)));
        assert_eq!(first_key(b"\r"), Some((Key::Enter, 1)));
        assert_eq!(first_key(b"\xff\xff"), Some((Key::Other, 2)));
    }
}
