//! The handshake of vpnkit, as HyperKit speaks it before its frames.
//!
//! | | bytes | |
//! |---|---|---|
//! | it | 49 | `VMN3T`, a version, the commit it was built from |
//! | we | 49 | the same again |
//! | it | 41 | a command, its UUID in 36 characters, 4 bytes that say nothing here |
//! | we | 258 | 1, the MTU and the longest frame (16 bits each, little-endian), its MAC address, zeros |
//!
//! Frames follow at once, behind short lengths. The address is the one that the configuration has for the
//! UUID, or the one that the socket's first guest must have, or a random one, which is the same for a UUID that comes
//! again; nothing holds the guest to it.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Read as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::frame::ETHERNET_BYTES;
use crate::link::Link;
use crate::link::listen::Cid;
use crate::link::serve::Entrance;
use crate::link::stream::{StreamKind, StreamLink, StreamSocket};
use crate::mac::Mac;
use crate::metrics::LinkRefusal;

/// Handshakes under way at once on one socket.
pub const HANDSHAKES_MAX: usize = 64;
/// Threads of them: those that make way take a moment to end.
const THREADS_MAX: usize = 2 * HANDSHAKES_MAX;
/// How long one may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

const MAGIC: &[u8] = b"VMN3T";
const INIT_BYTES: usize = 49;
const COMMAND_BYTES: usize = 41;
const UUID: std::ops::Range<usize> = 1..37;
const ANSWER_BYTES: usize = 258;

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("it does not speak vpnkit (expected VMN3T at first)")]
    Magic,
    #[error("its handshake was not whole after {} s", .0.as_secs())]
    Slow(Duration),
    #[error("its handshake broke off")]
    BrokenOff,
    #[error(
        "{HANDSHAKES_MAX} handshakes were under way, this one for the longest time, and it made way for another"
    )]
    MadeWay,
    #[error("its socket failed: {0}")]
    Io(io::Error),
}

impl HandshakeError {
    fn cause(&self) -> LinkRefusal {
        match self {
            Self::MadeWay => LinkRefusal::Limit,
            Self::Magic | Self::Slow(_) | Self::BrokenOff | Self::Io(_) => LinkRefusal::Handshake,
        }
    }
}

/// What guests are told.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// MAC addresses by UUID, in lower case.
    pub macs: HashMap<String, Mac>,
    /// MTU of guests' links, bytes.
    pub mtu_bytes: u16,
    /// What addresses of other UUIDs are made with.
    pub seed: RandomState,
}

/// The handshakes of one socket.
pub(super) struct Handshakes {
    answers: Arc<Answers>,
    under_way: Arc<Mutex<UnderWay>>,
    patience: Duration,
}

impl Handshakes {
    pub(super) fn new(answers: Answers) -> Self {
        Self {
            answers: Arc::new(answers),
            under_way: Arc::default(),
            patience: PATIENCE,
        }
    }

    /// Begins one; who completes it is let in. Returns at once.
    pub(super) fn begin(&self, entrance: &Arc<Entrance>, socket: StreamSocket, from: Option<Cid>) {
        let Some(spec) = entrance.foresee() else { return };
        let socket = Arc::new(socket);
        let Some(place) = Place::take(&self.under_way, &socket) else {
            entrance.refuse(
                LinkRefusal::Limit,
                &format_args!("{HANDSHAKES_MAX} handshakes are under way, and as many are ending"),
            );
            return;
        };
        let (answers, patience) = (Arc::clone(&self.answers), self.patience);
        let own = Arc::clone(entrance);
        let thread = thread::Builder::new()
            .name("handshake".to_owned())
            .spawn(move || {
                let done = shake(&socket, &answers, spec.pinned_mac, patience);
                match place.leave().and(done).and_then(|()| link(socket)) {
                    Ok(link) => own.come_in(link, from),
                    Err(error) => own.refuse(error.cause(), &error),
                }
            });
        if let Err(error) = thread {
            entrance.refuse(LinkRefusal::System, &error);
        }
    }
}

fn link(socket: Arc<StreamSocket>) -> Result<Link, HandshakeError> {
    // Nobody else has it once its place is left.
    let socket = Arc::into_inner(socket).ok_or(HandshakeError::MadeWay)?;
    StreamLink::new(socket, StreamKind::Vpnkit, &[])
        .map(Link::Stream)
        .map_err(HandshakeError::Io)
}

/// Which handshakes are under way.
#[derive(Default)]
struct UnderWay {
    next: u64,
    /// The longest there first.
    order: VecDeque<(u64, Arc<StreamSocket>)>,
    /// Threads, also of those that made way and have not ended yet.
    threads: usize,
}

/// One of the handshakes that may be under way.
struct Place {
    under_way: Arc<Mutex<UnderWay>>,
    number: u64,
}

impl Place {
    /// A place for one more; where all are taken, the one there longest makes way. `None` while those that did have
    /// not ended.
    fn take(under_way: &Arc<Mutex<UnderWay>>, socket: &Arc<StreamSocket>) -> Option<Self> {
        let mut all = lock(under_way);
        if all.threads >= THREADS_MAX {
            return None;
        }
        if all.order.len() >= HANDSHAKES_MAX
            && let Some((_, longest)) = all.order.pop_front()
        {
            longest.end();
        }
        all.threads += 1;
        all.next += 1;
        let number = all.next;
        all.order.push_back((number, Arc::clone(socket)));
        Some(Self {
            under_way: Arc::clone(under_way),
            number,
        })
    }

    /// Gives it up.
    ///
    /// # Errors
    /// It was another's already.
    fn leave(self) -> Result<(), HandshakeError> {
        let was_there = lock(&self.under_way).remove(self.number);
        if was_there {
            Ok(())
        } else {
            Err(HandshakeError::MadeWay)
        }
    }
}

impl UnderWay {
    /// Whether it was there.
    fn remove(&mut self, number: u64) -> bool {
        let at = self.order.iter().position(|(one, _)| *one == number);
        at.and_then(|at| self.order.remove(at)).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = lock(&self.under_way);
        all.remove(self.number);
        all.threads -= 1;
    }
}

fn lock(under_way: &Mutex<UnderWay>) -> MutexGuard<'_, UnderWay> {
    under_way.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shake(
    mut socket: &StreamSocket,
    answers: &Answers,
    pinned: Option<Mac>,
    patience: Duration,
) -> Result<(), HandshakeError> {
    let until = Instant::now() + patience;
    let late = || HandshakeError::Slow(patience);
    let mut init = [0; INIT_BYTES];
    // Whoever speaks something else is told so at its first bytes.
    let (magic, rest) = init.split_at_mut(MAGIC.len());
    read(socket, magic, until, late)?;
    if magic != MAGIC {
        return Err(HandshakeError::Magic);
    }
    read(socket, rest, until, late)?;
    socket.write_all(&init).map_err(|error| failed(error, late))?;
    let mut command = [0; COMMAND_BYTES];
    read(socket, &mut command, until, late)?;
    let answer = answers.answer(&command[UUID], pinned);
    socket.write_all(&answer).map_err(|error| failed(error, late))
}

/// Reads until `bytes` is full, and not beyond: what follows may be frames.
fn read(
    mut socket: &StreamSocket,
    mut bytes: &mut [u8],
    until: Instant,
    late: impl Fn() -> HandshakeError,
) -> Result<(), HandshakeError> {
    while !bytes.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        // Writes have it too: an answer always fits into an empty socket. The system counts microseconds, and
        // none are no limit.
        socket
            .set_patience(Some(left.max(Duration::from_millis(1))))
            .map_err(HandshakeError::Io)?;
        match socket.read(bytes) {
            Ok(0) => return Err(HandshakeError::BrokenOff),
            Ok(length) => bytes = &mut bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error, &late)),
        }
    }
    Ok(())
}

fn failed(error: io::Error, late: impl Fn() -> HandshakeError) -> HandshakeError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => late(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => HandshakeError::BrokenOff,
        _ => HandshakeError::Io(error),
    }
}

impl Answers {
    fn answer(&self, uuid: &[u8], pinned: Option<Mac>) -> [u8; ANSWER_BYTES] {
        let uuid = uuid.to_ascii_lowercase();
        let known = std::str::from_utf8(&uuid)
            .ok()
            .and_then(|uuid| self.macs.get(uuid));
        let mac = known.copied().or(pinned).unwrap_or_else(|| self.made_for(&uuid));
        let mut answer = [0; ANSWER_BYTES];
        let frame_bytes = self.mtu_bytes.saturating_add(ETHERNET_BYTES as u16);
        answer[0] = 1;
        answer[1..3].copy_from_slice(&self.mtu_bytes.to_le_bytes());
        answer[3..5].copy_from_slice(&frame_bytes.to_le_bytes());
        answer[5..11].copy_from_slice(&mac.0);
        answer
    }

    /// So that one that dials again is told what it was told before, and nobody else is.
    fn made_for(&self, uuid: &[u8]) -> Mac {
        let [a, b, c, d, e, f, ..] = self.seed.hash_one(uuid).to_be_bytes();
        // Locally administered, and one station's.
        Mac([(a & 0xfc) | 2, b, c, d, e, f])
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const UUID: &str = "c3d68012-0208-11ea-9fd7-f2189899ab08";
    const KNOWN: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee]);

    fn answers() -> Answers {
        Answers {
            macs: HashMap::from([(UUID.to_owned(), KNOWN)]),
            mtu_bytes: 1500,
            seed: RandomState::new(),
        }
    }

    fn init() -> Vec<u8> {
        let mut init = b"VMN3T\x16\0\0\0".to_vec();
        init.resize(INIT_BYTES, b'c');
        init
    }

    fn command(uuid: &str) -> Vec<u8> {
        [b"\x01", uuid.as_bytes(), &[0; 4]].concat()
    }

    /// What comes of a client that says this and then closes its writing half.
    fn outcome(said: &[u8]) -> (Result<(), HandshakeError>, Vec<u8>) {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(said).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let server = StreamSocket::from(server);
        let done = shake(&server, &answers(), None, PATIENCE);
        drop(server);
        let mut heard = Vec::new();
        // What was not read resets it.
        let _ = client.read_to_end(&mut heard);
        (done, heard)
    }

    #[test]
    fn a_whole_handshake_is_answered_with_mtu_and_address_and_takes_no_frame() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let said = [init(), command(&UUID.to_uppercase()), b"frames".to_vec()].concat();
        client.write_all(&said).unwrap();
        let server = StreamSocket::from(server);
        shake(&server, &answers(), None, PATIENCE).unwrap();
        let mut left = [0; 16];
        assert_eq!((&server).read(&mut left).unwrap(), 6);
        assert_eq!(&left[..6], b"frames");
        let mut heard = [0; INIT_BYTES + ANSWER_BYTES];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(heard[..INIT_BYTES], init());
        let answer = &heard[INIT_BYTES..];
        assert_eq!(answer[..5], [1, 0xdc, 5, 0xea, 5]);
        assert_eq!(answer[5..11], KNOWN.0);
        assert!(answer[11..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_unknown_uuid_has_the_pinned_address_or_one_of_its_own_that_cannot_be_foreseen() {
        let pinned = Mac([2, 0, 0, 0, 0, 9]);
        let of = |answers: &Answers, uuid, pinned| {
            let answer = answers.answer(uuid, pinned);
            Mac(answer[5..11].try_into().unwrap())
        };
        let (first, second) = (answers(), answers());
        let uuid = &b"nothing that is known, not even text\xff"[..];
        assert_eq!(of(&first, uuid, Some(pinned)), pinned);
        let one = of(&first, uuid, None);
        assert!(
            one.is_unicast() && one.0[0] & 2 == 2,
            "locally administered: {one}"
        );
        assert_eq!(of(&first, uuid, None), one, "as it was told before");
        assert_ne!(of(&first, b"another", None), one);
        assert_ne!(of(&second, uuid, None), one);
    }

    #[test]
    fn the_longest_mtu_fits_into_the_answer() {
        let answers = Answers {
            mtu_bytes: crate::config::MTU_BYTES_MAX,
            ..Answers::default()
        };
        let answer = answers.answer(b"", Some(KNOWN));
        assert_eq!(answer[1..5], [0xf0, 0xff, 0xfe, 0xff]);
    }

    #[test]
    fn what_is_no_handshake_or_half_of_one_is_told_apart() {
        assert!(matches!(
            outcome(b"GET / HTTP/1.1\r\n").0,
            Err(HandshakeError::Magic)
        ));
        assert!(matches!(outcome(b"VMN3T").0, Err(HandshakeError::BrokenOff)));
        assert!(matches!(outcome(b"").0, Err(HandshakeError::BrokenOff)));
        let half = [init(), command(UUID)[..40].to_vec()].concat();
        let (done, heard) = outcome(&half);
        assert!(matches!(done, Err(HandshakeError::BrokenOff)));
        assert_eq!(heard, init(), "the first half is answered");
    }

    #[test]
    fn one_that_drips_is_ended_in_time() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let patience = Duration::from_millis(150);
        let began = Instant::now();
        let dripping = thread::spawn(move || {
            for byte in init() {
                if client.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        let server = StreamSocket::from(server);
        let done = shake(&server, &answers(), None, patience);
        assert!(matches!(done, Err(HandshakeError::Slow(_))), "{done:?}");
        assert!(began.elapsed() < 4 * patience, "{:?}", began.elapsed());
        drop(server);
        dripping.join().unwrap();
    }

    #[test]
    fn the_one_there_longest_makes_way_is_told_so_and_places_are_given_back() {
        let under_way = Arc::default();
        let mut clients = Vec::new();
        let mut come = || {
            let (client, server) = UnixStream::pair().unwrap();
            clients.push(client);
            let socket = Arc::new(StreamSocket::from(server));
            Place::take(&under_way, &socket).map(|place| (place, socket))
        };
        let mut all: VecDeque<_> = (0..HANDSHAKES_MAX).map(|_| come().unwrap()).collect();
        let (latest, _) = come().unwrap();
        let (first, socket) = all.pop_front().unwrap();
        let done = shake(&socket, &answers(), None, PATIENCE);
        assert!(matches!(done, Err(HandshakeError::BrokenOff)), "{done:?}");
        assert!(matches!(first.leave(), Err(HandshakeError::MadeWay)));
        let (second, _) = all.pop_front().unwrap();
        second.leave().unwrap();
        // Two have left, and one has come: nobody makes way for the next.
        all.push_back(come().unwrap());
        let (third, _) = all.pop_front().unwrap();
        third.leave().unwrap();
        latest.leave().unwrap();
        let threads = |all: &VecDeque<_>| assert_eq!(lock(&under_way).threads, all.len());
        threads(&all);
        drop(all);
        assert_eq!(lock(&under_way).threads, 0);
        assert!(lock(&under_way).order.is_empty());
        let endless: Vec<_> = (0..THREADS_MAX).map(|_| come().unwrap()).collect();
        assert!(come().is_none(), "until those that made way have ended");
        drop(endless);
    }
}
