//! Whether a connection's first bytes begin a request of HTTP/1, told as early as possible.
//!
//! Generous on purpose: what a lenient server might take for a request (leading empty lines, tabs for
//! spaces, spaces in the target, `http/1.1`) is HTTP here, so that the strict reader refuses it instead of
//! letting it through as another protocol. Anything else is told from HTTP at the first byte that no
//! request has, or at the end of the line, so that clients of other protocols do not wait.

/// What the bytes so far begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guess {
    /// It may still be either.
    Undecided,
    /// A request.
    Http,
    /// Something else.
    Other,
}

/// Reads the first line byte by byte.
#[derive(Debug, Default)]
pub(super) struct Probe {
    place: Place,
    /// Words after the method, and whether one is under way.
    words: usize,
    in_word: bool,
    /// How much of `://` the last bytes are, and whether it was there.
    scheme: usize,
    absolute: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Place {
    /// Empty lines and spaces before the request.
    #[default]
    Before,
    Method,
    Target,
    /// So many bytes of [`VERSION`] stood after a space.
    Version(usize),
}

const VERSION: &[u8] = b"HTTP/";
const SCHEME: &[u8] = b"://";

impl Probe {
    /// Takes bytes until it is decided: what, and after how many.
    pub(super) fn read(&mut self, bytes: &[u8]) -> (Guess, usize) {
        for (at, byte) in bytes.iter().enumerate() {
            match self.step(*byte) {
                Guess::Undecided => {}
                guess => return (guess, at + 1),
            }
        }
        (Guess::Undecided, bytes.len())
    }

    fn step(&mut self, byte: u8) -> Guess {
        let space = matches!(byte, b' ' | b'\t');
        let line_end = matches!(byte, b'\r' | b'\n');
        match self.place {
            Place::Before if space || line_end => {}
            Place::Before if is_token(byte) => self.place = Place::Method,
            Place::Before => return Guess::Other,
            Place::Method if space => self.place = Place::Target,
            Place::Method if is_token(byte) => {}
            Place::Method => return Guess::Other,
            Place::Target | Place::Version(_) => return self.step_in_target(byte),
        }
        Guess::Undecided
    }

    fn step_in_target(&mut self, byte: u8) -> Guess {
        if matches!(byte, b'\r' | b'\n') {
            // Without a version: HTTP/0.9, which has no name but in an absolute target.
            return if self.absolute && self.words == 1 {
                Guess::Http
            } else {
                Guess::Other
            };
        }
        if matches!(byte, b' ' | b'\t') {
            self.place = Place::Version(0);
            self.in_word = false;
            return Guess::Undecided;
        }
        if byte < b' ' {
            return Guess::Other;
        }
        if !std::mem::replace(&mut self.in_word, true) {
            self.words += 1;
        }
        self.place = match self.place {
            Place::Version(matched) if matched == VERSION.len() && byte.is_ascii_digit() => {
                return Guess::Http;
            }
            Place::Version(matched)
                if VERSION
                    .get(matched)
                    .is_some_and(|b| b.eq_ignore_ascii_case(&byte)) =>
            {
                Place::Version(matched + 1)
            }
            _ => Place::Target,
        };
        self.scheme = if SCHEME.get(self.scheme) == Some(&byte) {
            self.scheme + 1
        } else {
            usize::from(byte == SCHEME[0])
        };
        self.absolute |= self.scheme == SCHEME.len();
        Guess::Undecided
    }
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(bytes: &[u8]) -> (Guess, usize) {
        let whole = Probe::default().read(bytes);
        let mut probe = Probe::default();
        for (at, byte) in bytes.iter().enumerate() {
            match probe.read(&[*byte]).0 {
                Guess::Undecided => {}
                decided => {
                    assert_eq!(whole, (decided, at + 1), "{bytes:?}");
                    return whole;
                }
            }
        }
        assert_eq!(whole, (Guess::Undecided, bytes.len()), "{bytes:?}");
        whole
    }

    #[test]
    fn whatever_a_lenient_server_takes_for_a_request_is_http() {
        for line in [
            &b"GET / HTTP/1.1"[..],
            b"\r\n\nGET / HTTP/1.1",
            b" get\t/a b\thttp/1",
            b"GET / a HTTP/1.0",
            b"PRI * HTTP/2",
            b"GET http://denied.test/\r",
            b"X- ::// HTTP/9",
            b"GET :/://a \n",
        ] {
            assert_eq!(guess(line).0, Guess::Http, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn other_protocols_are_told_at_their_first_byte_or_line() {
        for (bytes, at) in [
            (&b"SSH-2.0-OpenSSH_9.2\r\n"[..], 20),
            (b"\x16\x03", 1),
            (b"\0\0\0\x08", 1),
            (b"EHLO client.test\r\n", 17),
            (b"NICK me\n", 8),
            (b"0032git-upload-pack /x\0host=a\0", 23),
            (b"RFB 003.008\n", 12),
            (b"*1\r\n$4\r\nPING\r\n", 3),
            (b"GET /\r\n", 6),
            (b"DESCRIBE rtsp://a/b RTSP/1.0\r\n", 29),
            (b"<stream>", 1),
            (b"\xff\xfb\x01", 1),
        ] {
            assert_eq!(guess(bytes), (Guess::Other, at), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_line_not_yet_whole_is_neither() {
        for bytes in [
            &b""[..],
            b"\r\n",
            b"G",
            b"GET",
            b"GET ",
            b"GET / HTTP/",
            b"GET http://a",
        ] {
            assert_eq!(guess(bytes).0, Guess::Undecided);
        }
    }
}
