//! What Go's `encoding/json` says of a text that is not JSON (its `scanner.go` has the states and their words). Only
//! asked where a value could not be read, so it is written to be short. It keeps one byte for each bracket that is
//! open, of which there are no more than the body has.

/// What is wrong with the first value of a text, in Go's words.
pub(super) fn problem(text: &[u8]) -> String {
    let mut scan = Scan {
        text,
        at: 0,
        is_deep: None,
    };
    match scan.value() {
        Err(Problem::Ended) if text.iter().all(|byte| is_space(*byte)) => "EOF".to_owned(),
        Err(Problem::Ended) => "unexpected EOF".to_owned(),
        Err(Problem::Byte(byte, why)) => format!("invalid character {} {why}", quoted(byte)),
        // Well formed, and yet it was refused: it is nested too deeply, or a number is out of range.
        Ok(()) => match scan.is_deep {
            Some(bracket) => format!("invalid character {} {TOO_DEEP}", quoted(bracket)),
            None => "json: cannot unmarshal number into Go value of type float64".to_owned(),
        },
    }
}

enum Problem {
    /// The text ended inside of the value.
    Ended,
    /// A character that cannot stand where it does.
    Byte(u8, &'static str),
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
    /// The first bracket inside of more than are read here.
    is_deep: Option<u8>,
}

/// Go's `maxNestingDepth`.
const GO_DEPTH_MAX: usize = 10_000;
/// What `serde_json` reads: it has a stack, of which it takes a part for each.
const DEPTH_MAX: usize = 127;
/// Go's words for one more.
const TOO_DEEP: &str = "exceeded max depth";

impl Scan<'_> {
    fn next(&mut self) -> Result<u8, Problem> {
        let byte = *self.text.get(self.at).ok_or(Problem::Ended)?;
        self.at += 1;
        Ok(byte)
    }

    fn next_but_space(&mut self) -> Result<u8, Problem> {
        loop {
            let byte = self.next()?;
            if !is_space(byte) {
                return Ok(byte);
            }
        }
    }

    /// Scans one value with all that is in it.
    fn value(&mut self) -> Result<(), Problem> {
        // The brackets that are open.
        let mut open: Vec<u8> = Vec::new();
        let mut byte = self.next_but_space()?;
        loop {
            // A value begins with this byte.
            match byte {
                b'{' => {
                    self.enter(b'{', open.len())?;
                    byte = self.next_but_space()?;
                    if byte != b'}' {
                        self.key(byte)?;
                        open.push(b'{');
                        byte = self.next_but_space()?;
                        continue;
                    }
                }
                b'[' => {
                    self.enter(b'[', open.len())?;
                    byte = self.next_but_space()?;
                    if byte != b']' {
                        open.push(b'[');
                        continue;
                    }
                }
                b'"' => self.string()?,
                b'-' | b'0'..=b'9' => self.number(byte)?,
                b't' => self.word("true")?,
                b'f' => self.word("false")?,
                b'n' => self.word("null")?,
                other => return Err(Problem::Byte(other, "looking for beginning of value")),
            }
            // It has ended; so may those that it is in.
            loop {
                let Some(bracket) = open.last() else { return Ok(()) };
                match (bracket, self.next_but_space()?) {
                    (b'{', b'}') | (b'[', b']') => {
                        open.pop();
                    }
                    (b'{', b',') => {
                        let first = self.next_but_space()?;
                        self.key(first)?;
                        break;
                    }
                    (b'[', b',') => break,
                    (b'{', other) => return Err(Problem::Byte(other, "after object key:value pair")),
                    (_, other) => return Err(Problem::Byte(other, "after array element")),
                }
            }
            byte = self.next_but_space()?;
        }
    }

    /// One bracket more than so many are open.
    fn enter(&mut self, bracket: u8, open: usize) -> Result<(), Problem> {
        if open >= GO_DEPTH_MAX {
            return Err(Problem::Byte(bracket, TOO_DEEP));
        }
        if open >= DEPTH_MAX {
            self.is_deep.get_or_insert(bracket);
        }
        Ok(())
    }

    /// A key and its colon.
    fn key(&mut self, first: u8) -> Result<(), Problem> {
        if first != b'"' {
            return Err(Problem::Byte(first, "looking for beginning of object key string"));
        }
        self.string()?;
        match self.next_but_space()? {
            b':' => Ok(()),
            other => Err(Problem::Byte(other, "after object key")),
        }
    }

    fn string(&mut self) -> Result<(), Problem> {
        loop {
            match self.next()? {
                b'"' => return Ok(()),
                b'\\' => match self.next()? {
                    b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"' => {}
                    b'u' => {
                        for _ in 0..4 {
                            let digit = self.next()?;
                            if !digit.is_ascii_hexdigit() {
                                return Err(Problem::Byte(digit, "in \\u hexadecimal character escape"));
                            }
                        }
                    }
                    other => return Err(Problem::Byte(other, "in string escape code")),
                },
                byte if byte < b' ' => return Err(Problem::Byte(byte, "in string literal")),
                _ => {}
            }
        }
    }

    fn number(&mut self, first: u8) -> Result<(), Problem> {
        let mut first = first;
        if first == b'-' {
            first = self.next()?;
            if !first.is_ascii_digit() {
                return Err(Problem::Byte(first, "in numeric literal"));
            }
        }
        if first != b'0' {
            self.digits();
        }
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.digit("after decimal point in numeric literal")?;
        }
        if matches!(self.text.get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.text.get(self.at), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digit("in exponent of numeric literal")?;
        }
        Ok(())
    }

    /// At least one digit.
    fn digit(&mut self, place: &'static str) -> Result<(), Problem> {
        let digit = self.next()?;
        if !digit.is_ascii_digit() {
            return Err(Problem::Byte(digit, place));
        }
        self.digits();
        Ok(())
    }

    fn digits(&mut self) {
        while self.text.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
    }

    /// The rest of a word, of which one letter has been read.
    fn word(&mut self, word: &'static str) -> Result<(), Problem> {
        for (index, expected) in word.bytes().enumerate().skip(1) {
            let found = self.next()?;
            if found != expected {
                return Err(Problem::Byte(found, expecting(word, index)));
            }
        }
        Ok(())
    }
}

/// Go's words for a wrong letter of a word.
fn expecting(word: &str, index: usize) -> &'static str {
    match (word, index) {
        ("true", 1) => "in literal true (expecting 'r')",
        ("true", 2) => "in literal true (expecting 'u')",
        ("true", _) => "in literal true (expecting 'e')",
        ("false", 1) => "in literal false (expecting 'a')",
        ("false", 2) => "in literal false (expecting 'l')",
        ("false", 3) => "in literal false (expecting 's')",
        ("false", _) => "in literal false (expecting 'e')",
        ("null", 1) => "in literal null (expecting 'u')",
        _ => "in literal null (expecting 'l')",
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// A byte as Go quotes it.
fn quoted(byte: u8) -> String {
    match byte {
        b'\'' => r"'\''".to_owned(),
        b'"' => r#"'"'"#.to_owned(),
        b'\\' => r"'\\'".to_owned(),
        b'\n' => r"'\n'".to_owned(),
        b'\r' => r"'\r'".to_owned(),
        b'\t' => r"'\t'".to_owned(),
        0x07 => r"'\a'".to_owned(),
        0x08 => r"'\b'".to_owned(),
        0x0b => r"'\v'".to_owned(),
        0x0c => r"'\f'".to_owned(),
        byte if byte < b' ' || byte == 0x7f => format!(r"'\x{byte:02x}'"),
        0x80..=0x9f | 0xad => format!(r"'\u{byte:04x}'"),
        byte => format!("'{}'", char::from(byte)),
    }
}
