//! The way of a session from a dataplane to its controlplane, message by message, and the moment at which the
//! controlplane is killed on it.
//!
//! It reads as much of HTTP/2 (RFC 9113 §4.1, §6.1) and of gRPC (a byte and a length before each message) as it takes
//! to tell one message from the next, and passes messages on one at a time, each in frames of its own. So a kill
//! falls between two messages, whichever of them were written at once.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use prost::Message as _;
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message as Up;
use vnet_proto::v1::session_response::Message as Down;

/// When the controlplane is killed. Heartbeats come by the clock and do not count.
#[derive(Debug, Clone)]
pub enum Cut {
    /// At this step of a session, from 1: the connection is the first, then each message, of either side.
    Step(usize, Passes),
    /// At the first message of this kind, as the contract calls it in its `oneof`: `Held`.
    Kind(String, Passes),
}

/// Whether the message at which the controlplane is killed gets to the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    /// It is killed first.
    No,
    /// It is passed on first.
    Yes,
}

/// The way.
#[derive(Debug)]
pub struct Wire {
    path: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstream: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What is still to be killed, in turn.
    plan: VecDeque<Cut>,
    /// The controlplane that is there.
    serving: Option<i32>,
    closed: bool,
    /// Steps since it was there.
    steps: usize,
    /// Every step so far.
    log: Vec<String>,
    kinds: BTreeSet<String>,
    cuts: Vec<String>,
    /// The port of each flow that was asked about.
    misses: HashMap<u64, u32>,
    allowed: HashSet<u32>,
    held: HashSet<u32>,
}

/// What one side says, and to whom it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Dataplane,
    Controlplane,
}

impl Wire {
    /// Listens at a path, for sessions with the controlplane whose sessions' socket is `upstream`. They are refused
    /// until there is one ([`Wire::serves`]).
    ///
    /// # Panics
    /// When the path cannot be bound.
    pub fn listen(path: &Path, upstream: &Path, plan: impl IntoIterator<Item = Cut>) -> Wire {
        let listener = UnixListener::bind(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let state = State {
            plan: plan.into_iter().collect(),
            ..State::default()
        };
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            state: Mutex::new(state),
        });
        let own = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if own.state().closed {
                    return;
                }
                // What it is refused with does not matter: it is closed.
                let _ = own.take(stream);
            }
        });
        Wire {
            path: path.to_owned(),
            shared,
        }
    }

    /// This process is the controlplane from now on.
    pub fn serves(&self, pid: i32) {
        let mut state = self.shared.state();
        state.serving = Some(pid);
        state.steps = 0;
    }

    /// Whether the controlplane is there, as far as this has not killed it.
    pub fn is_served(&self) -> bool {
        self.shared.state().serving.is_some()
    }

    /// The messages at which it was killed so far, in turn.
    pub fn cuts(&self) -> Vec<String> {
        self.shared.state().cuts.clone()
    }

    /// Every step so far, for a reader.
    pub fn log(&self) -> String {
        self.shared.state().log.join("\n")
    }

    /// The kinds of all steps so far.
    pub fn kinds(&self) -> BTreeSet<String> {
        self.shared.state().kinds.clone()
    }

    /// The ports of which a dataplane asked and was told a yes.
    pub fn allowed(&self) -> HashSet<u32> {
        self.shared.state().allowed.clone()
    }

    /// The ports of which a dataplane asked and was told that a person is.
    pub fn held(&self) -> HashSet<u32> {
        self.shared.state().held.clone()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        // It wakes who waits for the next.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins a dataplane to the controlplane.
    fn take(self: &Arc<Self>, dataplane: UnixStream) -> io::Result<()> {
        let mut state = self.state();
        if state.serving.is_none() {
            return Ok(());
        }
        let mut controlplane = None;
        state.step("Connection", || {
            controlplane = Some(UnixStream::connect(&self.upstream)?);
            Ok(())
        })?;
        drop(state);
        let Some(controlplane) = controlplane else {
            return Ok(());
        };
        for side in [Side::Dataplane, Side::Controlplane] {
            let (from, to) = match side {
                Side::Dataplane => (dataplane.try_clone()?, controlplane.try_clone()?),
                Side::Controlplane => (controlplane.try_clone()?, dataplane.try_clone()?),
            };
            let own = Arc::clone(self);
            thread::spawn(move || {
                // However one direction ends, the other does.
                if let Err(error) = own.pump(side, &from, &to)
                    && error.kind() == io::ErrorKind::InvalidData
                {
                    own.state().log.push(format!("{side:?}: {error}"));
                }
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
        Ok(())
    }

    /// Passes on what one side says, until it says no more.
    fn pump(&self, side: Side, mut from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
        if side == Side::Dataplane {
            let mut preface = [0; PREFACE_BYTES];
            from.read_exact(&mut preface)?;
            to.write_all(&preface)?;
        }
        let mut messages = Vec::new();
        loop {
            let mut head = [0; 9];
            from.read_exact(&mut head)?;
            let [high, middle, low, kind, flags, stream @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]) as usize];
            from.read_exact(&mut payload)?;
            if kind != DATA {
                to.write_all(&[&head[..], &payload].concat())?;
                continue;
            }
            if flags & PADDED != 0 {
                return Err(nonsense("a padded frame"));
            }
            messages.extend(payload);
            while let Some(length) = whole_message(&messages)? {
                let message: Vec<u8> = messages.drain(..length).collect();
                let frames: Vec<u8> = message
                    .chunks(FRAME_BYTES_MAX)
                    .flat_map(|part| frame(part, 0, stream))
                    .collect();
                self.pass(side, &message[PREFIX_BYTES..], || to.write_all(&frames))?;
            }
            if flags & END_STREAM != 0 {
                to.write_all(&frame(&[], END_STREAM, stream))?;
            }
        }
    }

    /// One message's turn.
    fn pass(&self, side: Side, message: &[u8], write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let unreadable = |error: prost::DecodeError| nonsense(&error.to_string());
        let mut state = self.state();
        match side {
            Side::Dataplane => {
                let message = v1::SessionRequest::decode(message).map_err(unreadable)?.message;
                let kind = kind_of(message.as_ref());
                if let Some(Up::Miss(miss)) = message
                    && let Some(v1::miss::Subject::Flow(flow)) = miss.subject
                {
                    state.misses.insert(miss.miss_id, flow.port);
                }
                state.step(&kind, write)
            }
            Side::Controlplane => {
                let message = v1::SessionResponse::decode(message).map_err(unreadable)?.message;
                let kind = kind_of(message.as_ref());
                let mut written = false;
                let passed = state.step(&kind, || {
                    written = true;
                    write()
                });
                if written {
                    state.note(message);
                }
                passed
            }
        }
    }
}

impl State {
    /// What a dataplane is told. Whoever sees what comes of it finds it noted: the lock is held meanwhile.
    fn note(&mut self, told: Option<Down>) {
        let (miss, told) = match told {
            Some(Down::Verdict(verdict)) if verdict.action() == v1::Action::Allow => {
                (verdict.miss_id, &mut self.allowed)
            }
            Some(Down::Held(held)) => (held.miss_id, &mut self.held),
            _ => return,
        };
        told.extend(self.misses.get(&miss));
    }

    /// Passes something on, or kills the controlplane before it or after it.
    fn step(&mut self, kind: &str, pass: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(pid) = self.serving else {
            return Err(io::ErrorKind::ConnectionReset.into());
        };
        if kind == "Heartbeat" {
            return pass();
        }
        self.steps += 1;
        self.log.push(format!("{} {kind}", self.steps));
        self.kinds.insert(kind.to_owned());
        let passes = match self.plan.front() {
            Some(Cut::Step(step, passes)) if *step == self.steps => *passes,
            Some(Cut::Kind(of, passes)) if *of == kind => *passes,
            _ => return pass(),
        };
        self.plan.pop_front();
        if passes == Passes::Yes {
            pass()?;
        }
        self.log.push(format!("killed; passed on: {passes:?}"));
        self.cuts.push(kind.to_owned());
        // First, so that whoever finds it gone can know why.
        self.serving = None;
        let pid = Pid::from_raw(pid);
        kill(pid, Signal::SIGKILL)?;
        // Nothing that it did comes later. It is waited for by who started it.
        let _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

/// The length of the first message, with its prefix, once all of it is there.
fn whole_message(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else {
        return Ok(None);
    };
    let [compressed, length @ ..] = *prefix;
    if compressed != 0 {
        return Err(nonsense("a compressed message"));
    }
    let length = u32::from_be_bytes(length) as usize;
    Ok((rest.len() >= length).then_some(PREFIX_BYTES + length))
}

fn frame(payload: &[u8], flags: u8, stream: [u8; 4]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    [&length[..], &[DATA, flags], &stream, payload].concat()
}

/// What a message is called in its `oneof`.
fn kind_of<T: std::fmt::Debug>(message: Option<&T>) -> String {
    let text = message.map(|message| format!("{message:?}")).unwrap_or_default();
    text.split('(').next().unwrap_or_default().to_owned()
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what} is nothing that this reads"),
    )
}

/// RFC 9113 §3.4.
const PREFACE_BYTES: usize = 24;
/// RFC 9113 §4.2: what every receiver takes.
const FRAME_BYTES_MAX: usize = 16_384;
const DATA: u8 = 0;
const END_STREAM: u8 = 1;
const PADDED: u8 = 8;
/// Compressed or not, and the length.
const PREFIX_BYTES: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_whole_once_all_of_it_is_there() {
        let bytes = [0, 0, 0, 0, 2, 7, 7, 0, 0];
        assert_eq!(whole_message(&bytes[..4]).unwrap(), None);
        assert_eq!(whole_message(&bytes[..6]).unwrap(), None);
        assert_eq!(whole_message(&bytes).unwrap(), Some(7));
        assert!(whole_message(&[1, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn a_frame_says_how_long_it_is_and_of_which_stream() {
        assert_eq!(
            frame(b"ab", END_STREAM, [0, 0, 0, 1]),
            [0, 0, 2, 0, 1, 0, 0, 0, 1, b'a', b'b']
        );
    }
}
