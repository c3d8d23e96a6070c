//! DNS messages in a TCP byte stream: two bytes of length before each (RFC 1035 §4.2.2, RFC 7766 §8).

/// Puts messages together from a stream, in pieces of any size. Holds at most one unfinished message,
/// which its length bounds to 65,535 bytes; memory grows with what really came.
#[derive(Debug, Default)]
pub struct Messages {
    /// The unfinished message, its length included.
    part: Vec<u8>,
}

impl Messages {
    /// Takes bytes up to the end of the next message. How many were taken, and the message if it is
    /// whole; call again with the rest.
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Option<Vec<u8>>) {
        let mut taken = self.take_up_to(LENGTH_BYTES, bytes);
        let &[high, low, ..] = &self.part[..] else {
            return (taken, None);
        };
        let whole = LENGTH_BYTES + usize::from(u16::from_be_bytes([high, low]));
        taken += self.take_up_to(whole, &bytes[taken..]);
        if self.part.len() < whole {
            return (taken, None);
        }
        let mut message = std::mem::take(&mut self.part);
        message.drain(..LENGTH_BYTES);
        (taken, Some(message))
    }

    /// Fills the part to `length` bytes as far as `bytes` go.
    fn take_up_to(&mut self, length: usize, bytes: &[u8]) -> usize {
        let wanted = length.saturating_sub(self.part.len()).min(bytes.len());
        self.part.extend_from_slice(&bytes[..wanted]);
        wanted
    }
}

/// A message with its length before it; `None` when it is longer than a stream can say.
pub fn framed(message: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(message.len()).ok()?;
    let mut bytes = Vec::with_capacity(LENGTH_BYTES + message.len());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(message);
    Some(bytes)
}

const LENGTH_BYTES: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_whole_however_the_stream_is_cut() {
        let sent: [&[u8]; 4] = [b"one", b"", &[7; 65_535], b"four"];
        let stream: Vec<u8> = sent.iter().flat_map(|m| framed(m).unwrap()).collect();
        for size in [1, 2, 3, 1_000, stream.len()] {
            let mut messages = Messages::default();
            let mut got: Vec<Vec<u8>> = Vec::new();
            for mut piece in stream.chunks(size) {
                while !piece.is_empty() {
                    let (taken, message) = messages.feed(piece);
                    piece = &piece[taken..];
                    got.extend(message);
                }
            }
            assert_eq!(got, sent, "pieces of {size}");
            assert!(messages.part.is_empty());
        }
    }

    #[test]
    fn an_unfinished_message_takes_no_memory_that_did_not_come() {
        let mut messages = Messages::default();
        assert_eq!(messages.feed(&[0xff, 0xff, 1]), (3, None));
        assert!(messages.part.capacity() < 100);
        assert_eq!(framed(&[0; 65_536]), None);
    }
}
