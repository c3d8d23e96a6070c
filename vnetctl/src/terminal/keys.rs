//! What a key press looks like in the bytes of a terminal in raw mode, and what is no key press: a terminal also
//! answers there what a program asked it, tells of the mouse and of what is pasted. A command can ask for such
//! answers, so none of their bytes may be taken for a key, however they are cut into reads.
//!
//! The forms are those of ECMA-48 §5.4 and xterm's "Control Sequences".

/// A key that answers a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A character.
    Char(char),
    /// Return.
    Enter,
    /// Control-C.
    Interrupt,
    /// Control-D.
    EndOfFile,
    /// Control-Z.
    Suspend,
    /// Control-], which opens a question under a program that has the whole screen.
    Open,
    /// Anything else: a cursor key, a function key, another control character.
    Other,
}

/// What came from the terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// A key was pressed.
    Key(Key),
    /// The terminal answered a program: these bytes.
    Reply(Vec<u8>),
    /// What is no key and no answer: pasted text, the mouse, the focus.
    Noise,
}

/// Reads keys out of bytes. What is cut by the end of a read goes on with the next.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    state: State,
    /// The sequence or character so far.
    so_far: Vec<u8>,
    /// Something was left out of it.
    overlong: bool,
    /// Between the marks of a bracketed paste.
    pasting: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Ground,
    /// In a character of several bytes, of which so many are to come.
    Character(usize),
    Escape,
    Control,
    /// In a string that ends with ST or BEL.
    Text,
    /// In such a string, after an escape.
    TextEscape,
    /// So many characters are to come that mean nothing by themselves.
    Skip(usize),
}

/// Of a sequence that is longer not all is kept.
const SEQUENCE_MAX_BYTES: usize = 4096;
const ESCAPE: u8 = 0x1b;
const BELL: u8 = 0x07;
const INTERRUPT: u8 = 0x03;

impl Keys {
    /// Takes what was read.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<Input> {
        let mut found = Vec::new();
        for byte in bytes {
            if let Some(input) = self.step(*byte) {
                found.push(match input {
                    Input::Key(_) if self.pasting => Input::Noise,
                    input => input,
                });
            }
        }
        found
    }

    fn step(&mut self, byte: u8) -> Option<Input> {
        if self.so_far.len() >= SEQUENCE_MAX_BYTES {
            // Its end is still waited for, or the rest of it would be keys.
            self.so_far.truncate(SEQUENCE_MAX_BYTES / 2);
            self.overlong = true;
        }
        self.so_far.push(byte);
        match self.state {
            State::Ground => self.begin(byte),
            State::Character(1) => self.character(),
            State::Character(left) => self.go(State::Character(left - 1)),
            State::Escape => match byte {
                b'[' => self.go(State::Control),
                b']' | b'P' | b'_' | b'^' | b'X' => self.go(State::Text),
                // SS3 and one character: a function key, or one of the keypad.
                b'O' | b'N' => self.go(State::Skip(1)),
                ESCAPE => self.go(State::Escape),
                // Alt and a key.
                _ => self.end(Input::Key(Key::Other)),
            },
            State::Control => match byte {
                // A function key of Linux's console: CSI [ A.
                b'[' if self.so_far.ends_with(b"\x1b[[") => self.go(State::Skip(1)),
                0x20..=0x3f => None,
                // The mouse, in the form of X10: three characters follow.
                b'M' if self.so_far.len() <= 3 => self.go(State::Skip(3)),
                0x40..=0x7e => self.control(byte),
                // It is cut off by a control character.
                _ => self.end(Input::Noise),
            },
            State::Text => match byte {
                BELL => self.reply(),
                ESCAPE => self.go(State::TextEscape),
                // Nobody's string goes on after those; Alt-] begins one by mistake.
                b'\r' | b'\n' | INTERRUPT => self.end(Input::Noise),
                // ST as one character, at the end of its two bytes.
                0x9c if self.so_far.ends_with(b"\xc2\x9c") => self.reply(),
                _ => None,
            },
            State::TextEscape => self.reply(),
            // Of several bytes each, in the form 1005.
            State::Skip(left) => match byte {
                0x80..=0xbf => None,
                _ if left == 1 && byte < 0x80 => self.skipped(),
                _ if left == 1 => self.go(State::Character(following(byte))),
                _ => self.go(State::Skip(left - 1)),
            },
        }
    }

    fn begin(&mut self, byte: u8) -> Option<Input> {
        let key = match byte {
            ESCAPE => return self.go(State::Escape),
            b'\r' | b'\n' => Key::Enter,
            INTERRUPT => Key::Interrupt,
            0x04 => Key::EndOfFile,
            0x1a => Key::Suspend,
            0x1d => Key::Open,
            byte if byte.is_ascii_control() => Key::Other,
            0x80..=0x9f => return self.introducer(byte),
            0xc0.. => return self.go(State::Character(following(byte))),
            byte => Key::Char(char::from(byte)),
        };
        self.end(Input::Key(key))
    }

    /// What begins with one control character of the upper half (S8C1T).
    fn introducer(&mut self, control: u8) -> Option<Input> {
        match control {
            0x9b => self.go(State::Control),
            0x90 | 0x98 | 0x9d | 0x9e | 0x9f => self.go(State::Text),
            0x8e | 0x8f => self.go(State::Skip(1)),
            _ => self.end(Input::Noise),
        }
    }

    fn character(&mut self) -> Option<Input> {
        if self.so_far.first() == Some(&ESCAPE) {
            return self.skipped();
        }
        let character = std::str::from_utf8(&self.so_far)
            .ok()
            .and_then(|text| text.chars().next());
        match character {
            // As the control characters above, in UTF-8.
            Some(control @ '\u{80}'..='\u{9f}') => self.introducer(control as u8),
            Some(character) => self.end(Input::Key(Key::Char(character))),
            None => self.end(Input::Key(Key::Other)),
        }
    }

    fn control(&mut self, last: u8) -> Option<Input> {
        let parameters: &[u8] = match self.so_far.as_slice() {
            [ESCAPE, b'[', parameters @ .., _] => parameters,
            // From an introducer of the upper half, of one byte or two.
            other => &other[..other.len() - 1],
        };
        match (parameters, last) {
            (b"200", b'~') => {
                self.pasting = true;
                self.end(Input::Noise)
            }
            (b"201", b'~') => {
                self.pasting = false;
                self.end(Input::Noise)
            }
            // The mouse (1006), and the focus (1004).
            ([b'<', ..], b'M' | b'm') | ([], b'I' | b'O') => self.end(Input::Noise),
            // Answers: to DA, DSR, CPR, DECRQM, window reports, the keyboard's protocol.
            (_, b'c' | b'n' | b'R' | b'y' | b't' | b'u' | b'x') => self.reply(),
            _ => self.end(Input::Key(Key::Other)),
        }
    }

    fn skipped(&mut self) -> Option<Input> {
        let mouse = self.so_far.starts_with(b"\x1b[M");
        self.end(if mouse {
            Input::Noise
        } else {
            Input::Key(Key::Other)
        })
    }

    fn reply(&mut self) -> Option<Input> {
        let bytes = std::mem::take(&mut self.so_far);
        self.end(if self.overlong {
            Input::Noise
        } else {
            Input::Reply(bytes)
        })
    }

    fn go(&mut self, state: State) -> Option<Input> {
        self.state = state;
        None
    }

    fn end(&mut self, input: Input) -> Option<Input> {
        self.state = State::Ground;
        self.overlong = false;
        self.so_far.clear();
        Some(input)
    }
}

/// How many bytes follow the first of a character (RFC 3629 §3).
fn following(first: u8) -> usize {
    match first {
        0xf0.. => 3,
        0xe0.. => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(bytes: &[u8]) -> Vec<Input> {
        Keys::default().feed(bytes)
    }

    #[test]
    fn keys_are_told_apart() {
        let key = |key| vec![Input::Key(key)];
        assert_eq!(keys(b""), []);
        assert_eq!(keys(b"y"), key(Key::Char('y')));
        assert_eq!(keys("ä".as_bytes()), key(Key::Char('ä')));
        assert_eq!(keys("日".as_bytes()), key(Key::Char('日')));
        assert_eq!(keys(b"\x1b[A"), key(Key::Other));
        assert_eq!(keys(b"\x1b[1;5C"), key(Key::Other));
        assert_eq!(keys(b"\x1bOP"), key(Key::Other));
        assert_eq!(keys(b"\x1b[[A"), key(Key::Other));
        assert_eq!(keys(b"\x1by"), key(Key::Other));
        assert_eq!(keys(b"\x03"), key(Key::Interrupt));
        assert_eq!(keys(b"\x1d"), key(Key::Open));
        assert_eq!(keys(b"\r"), key(Key::Enter));
        assert_eq!(keys(b"\xff\xff\xff\xff"), key(Key::Other));
    }

    /// What a command can have a terminal send, each full of what would be answers.
    const NOISE: [&[u8]; 17] = [
        b"\x1b]lyyy\x1b\\",
        b"\x1b]11;rgb:y/y/y\x07",
        b"\x1bP1$ry\x1b\\",
        b"\x1bP>|yyy\x1b\\",
        b"\x1b_Gi=1;y\x1b\\",
        b"\x1b[24;80R",
        b"\x1b[?62;22c",
        b"\x1b[?2004;1$y",
        b"\x1b[?1u",
        b"\x1b[M yy",
        b"\x1b[Myyy",
        "\u{1b}[M y\u{79}".as_bytes(),
        "\u{1b}[M yä".as_bytes(),
        b"\x1b[<0;121;121M",
        b"\x1b[200~y\ry\x1b[201~",
        "\u{9d}lyyy\u{1b}\\".as_bytes(),
        b"\x90y\x1b\\",
    ];

    #[test]
    fn nothing_that_a_terminal_answers_is_a_key_however_it_is_cut() {
        for noise in NOISE {
            for cut in 0..=noise.len() {
                let mut keys = Keys::default();
                let mut found = keys.feed(&noise[..cut]);
                found.extend(keys.feed(&noise[cut..]));
                assert!(
                    !found.is_empty() && !found.iter().any(|input| matches!(input, Input::Key(_))),
                    "{:?} cut at {cut}: {found:?}",
                    noise.escape_ascii().to_string()
                );
                assert_eq!(
                    keys.feed(b"y"),
                    [Input::Key(Key::Char('y'))],
                    "after {:?}",
                    noise.escape_ascii().to_string()
                );
            }
        }
    }

    #[test]
    fn answers_are_kept_for_who_asked() {
        assert_eq!(keys(b"\x1b[3;4R"), [Input::Reply(b"\x1b[3;4R".to_vec())]);
        assert_eq!(
            keys(b"\x1b]11;x\x1b\\"),
            [Input::Reply(b"\x1b]11;x\x1b\\".to_vec())]
        );
    }

    #[test]
    fn sequence_without_end_is_bounded_and_ends_with_return() {
        let mut keys = Keys::default();
        keys.feed(b"\x1b]");
        keys.feed(&[b'y'; 3 * SEQUENCE_MAX_BYTES]);
        assert!(keys.so_far.capacity() <= 2 * SEQUENCE_MAX_BYTES);
        assert_eq!(keys.feed(b"y\x07y"), [Input::Noise, Input::Key(Key::Char('y'))]);
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"\x1b]yy\r"), [Input::Noise]);
        assert_eq!(keys.feed(b"n"), [Input::Key(Key::Char('n'))]);
    }
}
