//! What is seen of a TCP connection that two guests hold with each other: how far each side has come, so
//! that the connection can be ended in order, cut with RSTs that are believed, and forgotten in time.
//!
//! Nothing is terminated and nothing is corrected here (compare RFC 9293 §3.6 and RFC 5382 §5): a segment
//! that makes no sense is passed on, and the other guest's own TCP refuses it. A number that a guest made
//! up misleads only the RST that its own connection would be cut with, and the segment after that is
//! answered with the right one.

use crate::engine::reply::TcpHeader;
use crate::message::FlowEnd;

/// Which side sent a segment, seen from the guest of this engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sender {
    /// This guest.
    Guest,
    /// The other one.
    Neighbour,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// One side has not answered yet.
    Opening,
    /// Both have spoken; at most one has finished.
    Open,
    /// Both have finished and acknowledged it, or one has reset it.
    Over(FlowEnd),
}

/// One connection.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Track {
    guest: Side,
    neighbour: Side,
    over: Option<FlowEnd>,
}

/// What one side has sent.
#[derive(Debug, Clone, Copy, Default)]
struct Side {
    /// The sequence number of its SYN.
    first: Option<u32>,
    /// The sequence number after all that it has sent.
    next: Option<u32>,
    /// The sequence number after its FIN.
    fin: Option<u32>,
    /// The other side has acknowledged its FIN.
    finished: bool,
}

impl Track {
    /// Takes note of a segment that is passed on.
    pub(crate) fn observe(&mut self, sender: Sender, header: &TcpHeader) {
        let (from, to) = match sender {
            Sender::Guest => (&mut self.guest, &mut self.neighbour),
            Sender::Neighbour => (&mut self.neighbour, &mut self.guest),
        };
        if header.is_reset() {
            self.over.get_or_insert(match sender {
                Sender::Guest => FlowEnd::GuestReset,
                Sender::Neighbour => FlowEnd::HostReset,
            });
            return;
        }
        let end = header.sequence.wrapping_add(header.sequence_bytes);
        if header.flags & TcpHeader::SYN != 0 {
            from.first.get_or_insert(header.sequence);
        }
        if from.next.is_none_or(|next| is_after(end, next)) {
            from.next = Some(end);
        }
        if header.flags & TcpHeader::FIN != 0 {
            from.fin = Some(end);
        }
        if header.flags & TcpHeader::ACK != 0
            && to.fin.is_some_and(|fin| !is_after(fin, header.acknowledgement))
        {
            to.finished = true;
        }
        if self.guest.finished && self.neighbour.finished {
            self.over.get_or_insert(FlowEnd::Finished);
        }
    }

    /// Where it is.
    pub(crate) fn stage(&self) -> Stage {
        match self.over {
            Some(end) => Stage::Over(end),
            None if self.guest.next.is_none() || self.neighbour.next.is_none() => Stage::Opening,
            None => Stage::Open,
        }
    }

    /// Whether a SYN of this guest's repeats the one that opened the connection.
    pub(crate) fn is_repeated(&self, header: &TcpHeader) -> bool {
        self.guest.first == Some(header.sequence)
    }

    /// Sequence and acknowledgement number of the RST that this guest will believe (RFC 5961 §3.2: exactly
    /// what it expects next); `None` when there is nothing left to reset.
    pub(crate) fn reset_to_guest(&self) -> Option<(u32, Option<u32>)> {
        match self.over {
            Some(_) => None,
            None => Some((self.neighbour.next.unwrap_or(0), self.guest.next)),
        }
    }
}

/// Whether a sequence number comes after another (RFC 9293 §3.4: modulo 2^32).
fn is_after(number: u32, other: u32) -> bool {
    (number.wrapping_sub(other) as i32) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIN: u8 = TcpHeader::FIN | TcpHeader::ACK;

    fn segment(flags: u8, sequence: u32, acknowledgement: u32, bytes: u32) -> TcpHeader {
        TcpHeader {
            source: 1,
            destination: 2,
            sequence,
            acknowledgement,
            flags,
            sequence_bytes: bytes,
        }
    }

    /// Open: the guest has sent up to 101, the neighbour up to 901.
    fn open() -> Track {
        let mut track = Track::default();
        track.observe(Sender::Guest, &segment(TcpHeader::SYN, 100, 0, 1));
        assert_eq!(track.stage(), Stage::Opening);
        track.observe(
            Sender::Neighbour,
            &segment(TcpHeader::SYN | TcpHeader::ACK, 900, 101, 1),
        );
        assert_eq!(track.stage(), Stage::Open);
        track
    }

    #[test]
    fn it_is_over_when_both_ends_are_acknowledged_and_not_before() {
        let mut track = open();
        track.observe(Sender::Guest, &segment(FIN, 101, 901, 1));
        track.observe(Sender::Neighbour, &segment(TcpHeader::ACK, 901, 102, 500));
        assert_eq!(track.stage(), Stage::Open, "a half close is not the end");
        track.observe(Sender::Neighbour, &segment(FIN, 1401, 102, 1));
        track.observe(Sender::Guest, &segment(TcpHeader::ACK, 102, 1401, 0));
        assert_eq!(track.stage(), Stage::Open, "its FIN is not acknowledged");
        track.observe(Sender::Guest, &segment(TcpHeader::ACK, 102, 1402, 0));
        assert_eq!(track.stage(), Stage::Over(FlowEnd::Finished));
        assert_eq!(track.reset_to_guest(), None);
    }

    #[test]
    fn a_reset_is_the_end_and_says_whose() {
        let mut track = open();
        track.observe(Sender::Neighbour, &segment(TcpHeader::RST, 901, 0, 0));
        assert_eq!(track.stage(), Stage::Over(FlowEnd::HostReset));
        let mut track = open();
        track.observe(Sender::Guest, &segment(TcpHeader::RST, 101, 0, 0));
        track.observe(Sender::Neighbour, &segment(TcpHeader::RST, 901, 0, 0));
        assert_eq!(track.stage(), Stage::Over(FlowEnd::GuestReset), "the first one");
    }

    #[test]
    fn a_reset_is_made_of_what_the_guest_expects_next() {
        let mut track = Track::default();
        track.observe(Sender::Guest, &segment(TcpHeader::SYN, u32::MAX, 0, 1));
        assert_eq!(
            track.reset_to_guest(),
            Some((0, Some(0))),
            "of an unanswered SYN the acknowledgement counts"
        );
        let mut track = open();
        track.observe(Sender::Neighbour, &segment(TcpHeader::ACK, 901, 101, 99));
        track.observe(Sender::Neighbour, &segment(TcpHeader::ACK, 901, 101, 10));
        assert_eq!(
            track.reset_to_guest(),
            Some((1000, Some(101))),
            "what is repeated takes nothing back"
        );
        let mut target = Track::default();
        target.observe(Sender::Neighbour, &segment(TcpHeader::SYN, 7, 0, 1));
        assert_eq!(target.reset_to_guest(), Some((8, None)));
    }

    #[test]
    fn sequence_numbers_wrap() {
        let mut track = open();
        track.observe(Sender::Guest, &segment(TcpHeader::ACK, u32::MAX - 9, 901, 20));
        // Half the space away from 101: before it, hence old.
        assert_eq!(track.reset_to_guest(), Some((901, Some(101))));
        let mut track = Track::default();
        track.observe(Sender::Guest, &segment(TcpHeader::SYN, u32::MAX - 5, 0, 1));
        track.observe(
            Sender::Neighbour,
            &segment(TcpHeader::SYN | TcpHeader::ACK, 1, 0, 1),
        );
        track.observe(Sender::Guest, &segment(TcpHeader::ACK, u32::MAX - 4, 2, 10));
        assert_eq!(track.reset_to_guest(), Some((2, Some(5))));
    }

    #[test]
    fn a_repeated_syn_is_known_by_its_number() {
        let track = open();
        assert!(track.is_repeated(&segment(TcpHeader::SYN, 100, 0, 1)));
        assert!(!track.is_repeated(&segment(TcpHeader::SYN, 101, 0, 1)));
    }
}
