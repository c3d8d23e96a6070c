//! Reads the name that a guest's first bytes speak, where a verdict rests on a name.
//!
//! An address that was looked up for one name may serve many. So a verdict that rests on a name demands
//! that the guest says that name: in a TLS hello ([`tls`]), in every request of plain HTTP ([`http`]), in
//! the Initial packets of QUIC ([`quic`]). [`Inspector`] follows one TCP connection, and
//! [`DatagramInspector`] one UDP association. Both are pure: bytes in, and how many of them may pass out.
//!
//! Names come from the guest and servers do not agree on what a strange hello or request means. So nothing
//! is guessed: what is not exactly as the protocol's text says is refused, and a hello without a name is
//! never taken for one with the right name.
//!
//! What this cannot see: what is inside TLS (a Host that differs from the server name), a name in an
//! encrypted hello, and TLS that begins in the middle of another protocol (STARTTLS).

pub mod http;
mod probe;
pub mod quic;
mod refusal;
pub mod tls;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{Name, PortRange};

pub use crate::engine::inspect::refusal::{InspectRefusal, Spoken};
use crate::engine::inspect::tls::Hello;

/// How long a guest may take to speak a name that is demanded, from its connection's beginning, and how
/// long bytes are held that may still become one.
pub const NAME_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of one TCP flow that are held: a hello or a request's head must fit.
pub const HELD_BYTES_MAX: usize = 64 << 10;

const TLS_PORT: u16 = 443;
const HTTP_PORT: u16 = 80;

/// Which names may pass.
pub trait Names {
    /// Whether this name may, at this port: the flow's, or the one that a CONNECT asks for.
    fn may_pass(&self, name: &Name, port: u16) -> bool;
}

/// Names at a range of ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameList {
    /// Any of these, and nothing below them.
    pub names: Vec<Name>,
    /// The ports: those of the verdict that the names are of.
    pub ports: PortRange,
}

impl Names for NameList {
    fn may_pass(&self, name: &Name, port: u16) -> bool {
        self.ports.contains(port) && self.names.contains(name)
    }
}

impl<N: Names> Names for Arc<N> {
    fn may_pass(&self, name: &Name, port: u16) -> bool {
        self.as_ref().may_pass(name, port)
    }
}

/// How much a name is demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Nothing passes before a name that may.
    Require,
    /// What speaks no name passes; what speaks one must speak one that may pass.
    MatchIfPresent,
}

/// What is demanded of one flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand<N> {
    /// Which names may pass.
    pub names: N,
    /// How much one is demanded.
    pub level: Level,
    /// Whether a hello that hides its name is refused; else the name that it shows counts.
    pub deny_ech: bool,
    /// Whether QUIC is refused rather than read.
    pub deny_quic: bool,
    /// The flow's port.
    pub port: u16,
}

impl<N: Names> Demand<N> {
    fn check_hello(&self, spoken: Spoken, hello: &Hello, port: u16) -> Result<(), InspectRefusal> {
        if hello.ech && self.deny_ech {
            return Err(InspectRefusal::Ech);
        }
        self.check(spoken, hello.name.as_ref(), port)
    }

    fn check(&self, spoken: Spoken, name: Option<&Name>, port: u16) -> Result<(), InspectRefusal> {
        match name {
            Some(name) if self.names.may_pass(name, port) => Ok(()),
            Some(name) => Err(InspectRefusal::Mismatch {
                spoken,
                name: name.clone(),
                port,
            }),
            None if self.level == Level::MatchIfPresent => Ok(()),
            None => Err(InspectRefusal::Missing(spoken)),
        }
    }
}

/// What may be done with the guest's bytes.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Nothing beyond what might pass before.
    NeedMore,
    /// So many bytes, counted from the flow's first.
    Pass(u64),
    /// Everything from now on.
    PassAll,
    /// Nothing any more: cut both sides.
    Refuse(InspectRefusal),
}

/// Follows one TCP connection of a guest.
#[derive(Debug)]
pub struct Inspector<N> {
    demand: Demand<N>,
    /// The port whose protocol is expected: the flow's, or that of a tunnel inside it.
    port: u16,
    state: State,
    /// Bytes before those that `state` counts.
    base: u64,
    passed: u64,
}

#[derive(Debug)]
enum State {
    Start,
    Tls(tls::Reader),
    Http(http::Filter),
    Open,
    Refused(InspectRefusal),
}

impl<N: Names> Inspector<N> {
    /// A connection of which nothing was read.
    pub fn new(demand: Demand<N>) -> Self {
        Self {
            port: demand.port,
            demand,
            state: State::Start,
            base: 0,
            passed: 0,
        }
    }

    /// Whether everything may pass from now on, and there is nothing left to follow.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    /// Takes the guest's bytes that follow [`Self::seen`].
    pub fn handle(&mut self, bytes: &[u8]) -> Progress {
        let result = self.advance(bytes);
        self.settle(result)
    }

    /// Bytes taken, counted from the flow's first. Those beyond are to be given again.
    pub fn seen(&self) -> u64 {
        self.base
            + match &self.state {
                State::Tls(reader) => reader.seen(),
                State::Http(filter) => filter.seen(),
                State::Start | State::Open | State::Refused(_) => 0,
            }
    }

    /// Bytes that may pass, counted from the flow's first; no limit once everything may.
    pub fn passed(&self) -> u64 {
        match self.state {
            State::Open => u64::MAX,
            _ => self.passed,
        }
    }

    /// Whether the server's next bytes must be shown to [`Self::handle_answer`] before they go on.
    pub fn wants_answer(&self) -> bool {
        matches!(&self.state, State::Http(filter) if filter.wants_answer())
    }

    /// Takes the server's bytes. Afterwards the guest's may go on: give those that follow [`Self::seen`].
    pub fn handle_answer(&mut self, bytes: &[u8]) -> Progress {
        let result = match &mut self.state {
            State::Http(filter) => filter.read_answer(bytes).map(|step| self.follow(step)),
            _ => Ok(()),
        };
        self.settle(result)
    }

    /// Whether the guest has to say something more before it is known whether it may go on. Then
    /// [`NAME_PATIENCE`] runs; when it is over, [`Self::handle_late`].
    pub fn is_waiting(&self) -> bool {
        match &self.state {
            State::Start => self.demand.level == Level::Require,
            State::Tls(_) | State::Http(_) => {
                self.seen() > self.passed || (self.passed == 0 && self.demand.level == Level::Require)
            }
            State::Open | State::Refused(_) => false,
        }
    }

    /// The guest took longer than [`NAME_PATIENCE`].
    pub fn handle_late(&mut self) -> Progress {
        if self.is_waiting() {
            return self.settle(Err(InspectRefusal::Late));
        }
        Progress::NeedMore
    }

    fn settle(&mut self, result: Result<(), InspectRefusal>) -> Progress {
        if let Err(refusal) = result {
            self.base = self.seen();
            self.state = State::Refused(refusal);
        }
        let before = self.passed;
        match &self.state {
            State::Start => {}
            State::Tls(reader) => self.passed = self.base + reader.passed(),
            State::Http(filter) => self.passed = self.base + filter.passed(),
            State::Open => return Progress::PassAll,
            State::Refused(refusal) => return Progress::Refuse(refusal.clone()),
        }
        if self.passed > before {
            Progress::Pass(self.passed)
        } else {
            Progress::NeedMore
        }
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<(), InspectRefusal> {
        let begun = self.seen();
        loop {
            let taken = usize::try_from(self.seen() - begun).unwrap_or(usize::MAX);
            let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) else {
                return Ok(());
            };
            match &mut self.state {
                State::Start => self.start(rest[0])?,
                State::Tls(reader) => match reader.read(rest)? {
                    tls::Reading::NeedMore => return check_held(reader.seen() - reader.passed()),
                    tls::Reading::NotTls => self.open_other()?,
                    tls::Reading::Hello(hello) => {
                        self.demand.check_hello(Spoken::Tls, &hello, self.port)?;
                    }
                    tls::Reading::Done => self.open(),
                },
                State::Http(filter) => {
                    let (demand, port) = (&self.demand, self.port);
                    let step = filter.read(rest, &mut |request| {
                        let port = request.tunnel.unwrap_or(port);
                        demand.check(Spoken::Http, request.name.as_ref(), port)
                    })?;
                    if step == http::Step::NotHttp {
                        self.open_other()?;
                    } else {
                        return Ok(());
                    }
                }
                State::Open => return Ok(()),
                State::Refused(refusal) => return Err(refusal.clone()),
            }
        }
    }

    /// Chooses the reader by the first byte; where a name is demanded, as the port says.
    fn start(&mut self, first: u8) -> Result<(), InspectRefusal> {
        const HANDSHAKE_RECORD: u8 = 22;
        // Servers are known to skip these before the hello.
        const SMALL_RECORDS: [u8; 2] = [20, 21];
        let is_matched = self.demand.level == Level::MatchIfPresent;
        let is_tls = first == HANDSHAKE_RECORD || is_matched && SMALL_RECORDS.contains(&first);
        if self.demand.level == Level::Require {
            match (self.port, is_tls) {
                (TLS_PORT, false) => return Err(InspectRefusal::OtherProtocol(Spoken::Tls)),
                (HTTP_PORT, true) => return Err(InspectRefusal::OtherProtocol(Spoken::Http)),
                _ => {}
            }
        }
        self.state = if is_tls {
            State::Tls(tls::Reader::default())
        } else {
            State::Http(http::Filter::default())
        };
        Ok(())
    }

    /// Neither TLS nor HTTP.
    fn open_other(&mut self) -> Result<(), InspectRefusal> {
        match (self.demand.level, self.port) {
            (Level::MatchIfPresent, _) => {
                self.open();
                Ok(())
            }
            (Level::Require, TLS_PORT) => Err(InspectRefusal::OtherProtocol(Spoken::Tls)),
            (Level::Require, HTTP_PORT) => Err(InspectRefusal::OtherProtocol(Spoken::Http)),
            (Level::Require, _) => Err(InspectRefusal::NoProtocol),
        }
    }

    fn open(&mut self) {
        self.base = self.seen();
        self.state = State::Open;
    }

    /// After the server's answer to an Upgrade or CONNECT.
    fn follow(&mut self, step: http::Step) {
        match step {
            http::Step::Going | http::Step::NotHttp => {}
            http::Step::Upgraded => self.open(),
            http::Step::Tunnel(port) => {
                self.base = self.seen();
                self.port = port;
                self.state = State::Start;
            }
        }
    }
}

/// Records' headers count too: a hello in records of one byte each is six times as long.
fn check_held(bytes: u64) -> Result<(), InspectRefusal> {
    if bytes > HELD_BYTES_MAX as u64 {
        return Err(InspectRefusal::Limit {
            spoken: Spoken::Tls,
            of: "bytes",
            limit: HELD_BYTES_MAX,
        });
    }
    Ok(())
}

/// What is done with a datagram of a guest's.
#[derive(Debug, Clone, PartialEq)]
pub enum DatagramProgress {
    /// It was kept.
    Held,
    /// It may pass, after those that [`DatagramInspector::take_released`] gives back.
    Pass,
    /// It goes nowhere.
    Drop,
    /// Nothing may pass any more: end the association.
    Refuse(InspectRefusal),
}

/// Follows one UDP association of a guest.
pub struct DatagramInspector<N> {
    demand: Demand<N>,
    association: quic::Association,
    agreed: bool,
    refused: Option<InspectRefusal>,
}

impl<N: Names> DatagramInspector<N> {
    /// An association of which nothing was read.
    pub fn new(demand: Demand<N>) -> Self {
        Self {
            demand,
            association: quic::Association::default(),
            agreed: false,
            refused: None,
        }
    }

    /// Takes a datagram.
    pub fn handle(&mut self, datagram: &[u8]) -> DatagramProgress {
        if let Some(refusal) = &self.refused {
            return DatagramProgress::Refuse(refusal.clone());
        }
        if self.demand.deny_quic && quic::looks_like_initial(datagram) {
            return self.refuse(InspectRefusal::QuicDenied);
        }
        // Other protocols pass where a name is not demanded. Of QUIC, what follows its Initial packets is
        // of no use to a server that has not seen those.
        if self.demand.level == Level::MatchIfPresent && !quic::looks_like_initial(datagram) {
            return DatagramProgress::Pass;
        }
        let demand = &self.demand;
        let fate = self.association.handle(datagram, &mut |hello| {
            demand.check_hello(Spoken::Quic, hello, demand.port)
        });
        match fate {
            Ok(quic::Fate::Held) => DatagramProgress::Held,
            Ok(quic::Fate::Pass) => {
                self.agreed = true;
                DatagramProgress::Pass
            }
            Ok(quic::Fate::Drop) => DatagramProgress::Drop,
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// Datagrams that were held and may pass now, oldest first. Look after every datagram.
    pub fn take_released(&mut self) -> Vec<Box<[u8]>> {
        self.association.take_released()
    }

    /// As [`Inspector::is_waiting`].
    pub fn is_waiting(&self) -> bool {
        let required = self.demand.level == Level::Require && !self.agreed;
        self.refused.is_none() && (required || self.association.is_holding())
    }

    /// As [`Inspector::handle_late`].
    pub fn handle_late(&mut self) -> DatagramProgress {
        if self.is_waiting() {
            return self.refuse(InspectRefusal::Late);
        }
        DatagramProgress::Drop
    }

    fn refuse(&mut self, refusal: InspectRefusal) -> DatagramProgress {
        self.refused = Some(refusal.clone());
        self.association = quic::Association::default();
        DatagramProgress::Refuse(refusal)
    }
}
