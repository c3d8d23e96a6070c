//! Asks upstream DNS servers what guests were allowed to look up (RFC 1035 §7.2, RFC 5452, RFC 7766).
//!
//! Each question goes out on a fresh connected UDP socket (the kernel picks a random port) under a fresh
//! random id, and only an answer with that id to the identical question is taken. A truncated answer is
//! fetched again over TCP, whatever the guest came over; the gateway cuts it to what the guest takes. Servers
//! are tried in order, more patiently in the second round, all within
//! [`ResolverConfig::total_time`].
//!
//! Owns the upstreams and the exchanges. Which names may be asked for is decided before; nothing is
//! cached here. Which servers those are is in [`host`].

mod exchange;
pub mod host;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use crate::egress::resolver::exchange::{Exchange, Outcome};
use crate::egress::resolver::host::ResolvConf;
use crate::engine::gateway::dns::message::question_of;

/// The time in which a question is answered or given up, unless configured otherwise.
pub const TOTAL_TIME: Duration = Duration::from_secs(10);
/// How long each server is waited for, by round, in hundredths of the whole time.
const ROUND_SHARES: [u32; 3] = [15, 30, 50];
/// Questions of one guest under way at once, unless configured otherwise. Each has one socket, whose descriptor
/// comes out of the guest's share: that is what bounds the questions of all guests together.
pub const IN_FLIGHT_MAX: usize = 512;
/// Servers asked at most, in order; those beyond are left out.
pub const SERVERS_MAX: usize = 8;

/// Where questions go.
#[derive(Debug, Clone)]
pub struct ResolverConfig {
    /// The servers.
    pub upstreams: Upstreams,
    /// Addresses never asked: the gateway's own, which would be asking ourselves.
    pub never: Vec<IpAddr>,
    /// Questions of one guest under way at once.
    pub in_flight_max: usize,
    /// The time in which a question is answered or given up.
    pub total_time: Duration,
}

impl ResolverConfig {
    /// With the usual limits.
    pub fn new(upstreams: Upstreams, never: Vec<IpAddr>) -> Self {
        Self {
            upstreams,
            never,
            in_flight_max: IN_FLIGHT_MAX,
            total_time: TOTAL_TIME,
        }
    }
}

/// Which servers.
#[derive(Debug, Clone)]
pub enum Upstreams {
    /// These (`--dns`, or what the front process passes on).
    Fixed(Vec<SocketAddr>),
    /// Those of the host, read from a file of the form of resolv.conf(5) and again whenever it changes.
    Host(std::path::PathBuf),
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// There is nobody to ask.
    #[error(
        "no DNS server is configured; give one in the host's resolv.conf (vnet-dataplane and vnetctl up take --dns, too)"
    )]
    NoServers,
    /// Too many questions of this guest are under way.
    #[error("{0} DNS questions of this guest are under way already")]
    Busy(usize),
    /// What shall be asked is not a question.
    #[error("the query is not one question")]
    Malformed,
    /// Nobody answered in time.
    #[error("none of {servers} DNS servers answered within {within:?}")]
    NoAnswer {
        /// How many there are.
        servers: usize,
        /// For how long they were asked.
        within: Duration,
        /// What went wrong last, if it was more than silence.
        #[source]
        last: Option<std::io::Error>,
    },
}

/// What happened so far.
#[derive(Debug, Default)]
pub struct ResolverCounts {
    /// Questions asked.
    pub questions: AtomicU64,
    /// Refused because too many of their guest were under way.
    pub busy: AtomicU64,
    /// Questions that nobody answered.
    pub unanswered: AtomicU64,
    /// Datagrams with another id or question than the one asked.
    pub mismatched: AtomicU64,
    /// Questions asked again over TCP.
    pub over_tcp: AtomicU64,
}

/// Asks upstream servers. Clones share servers, limit and counts; one that is made [for a guest](Self::for_guest) has
/// a limit of its own, so that no guest's questions keep another's from being asked.
#[derive(Debug, Clone)]
pub struct Resolver {
    shared: Arc<Shared>,
    in_flight: Arc<Semaphore>,
}

#[derive(Debug)]
struct Shared {
    servers: Mutex<Servers>,
    never: Vec<IpAddr>,
    in_flight_max: usize,
    total_time: Duration,
    counts: ResolverCounts,
}

#[derive(Debug)]
enum Servers {
    Fixed(Vec<SocketAddr>),
    Host(ResolvConf),
}

impl Resolver {
    /// A resolver. Needs no network to start: without servers every question fails by itself.
    pub fn new(config: ResolverConfig) -> Self {
        let servers = match config.upstreams {
            Upstreams::Fixed(servers) => Servers::Fixed(servers),
            Upstreams::Host(path) => Servers::Host(ResolvConf::new(path)),
        };
        Self {
            in_flight: Arc::new(Semaphore::new(config.in_flight_max)),
            shared: Arc::new(Shared {
                servers: Mutex::new(servers),
                never: config.never,
                in_flight_max: config.in_flight_max,
                total_time: config.total_time,
                counts: ResolverCounts::default(),
            }),
        }
    }

    /// The same for one guest more: servers and counts are shared, the limit is its own.
    pub fn for_guest(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            in_flight: Arc::new(Semaphore::new(self.shared.in_flight_max)),
        }
    }

    /// Replaces the servers, for instance when the front process saw the host's settings change.
    pub fn set_servers(&self, servers: Vec<SocketAddr>) {
        *self.shared.servers.lock().unwrap_or_else(PoisonError::into_inner) = Servers::Fixed(servers);
    }

    /// Asks one question. The answer is the message as the server sent it, with the id of `query`.
    ///
    /// # Errors
    /// [`ResolveError`] when there is no answer at all. A server's own error (SERVFAIL, REFUSED) is an
    /// answer, once no other server has a better one.
    pub async fn resolve(&self, query: Vec<u8>) -> Result<Vec<u8>, ResolveError> {
        let shared = &*self.shared;
        let Some(question) = question_of(&query) else {
            return Err(ResolveError::Malformed);
        };
        let Ok(_place) = self.in_flight.try_acquire() else {
            shared.counts.busy.fetch_add(1, Relaxed);
            return Err(ResolveError::Busy(shared.in_flight_max));
        };
        if self.servers().is_empty() {
            return Err(ResolveError::NoServers);
        }
        shared.counts.questions.fetch_add(1, Relaxed);
        let exchange = Exchange {
            query: &query,
            question,
            counts: &shared.counts,
        };
        let deadline = Instant::now() + shared.total_time;
        let rounds = ROUND_SHARES.map(|share| shared.total_time * share / 100);
        let mut attempt = Attempt::default();
        let _ = timeout_at(deadline, attempt.run(&exchange, || self.servers(), rounds)).await;
        match attempt.best {
            Some(mut answer) => {
                answer[..2].copy_from_slice(&query[..2]);
                Ok(answer)
            }
            None => {
                shared.counts.unanswered.fetch_add(1, Relaxed);
                let (servers, within) = (self.servers().len(), shared.total_time);
                Err(ResolveError::NoAnswer {
                    servers,
                    within,
                    last: attempt.last_error,
                })
            }
        }
    }

    /// The servers that a question would go to now, in order.
    pub fn servers(&self) -> Vec<SocketAddr> {
        let mut servers = self.shared.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let all = match &mut *servers {
            Servers::Fixed(servers) => &*servers,
            Servers::Host(file) => &file.now().servers,
        };
        let usable = all
            .iter()
            .filter(|s| !self.shared.never.contains(&s.ip().to_canonical()));
        usable.copied().take(SERVERS_MAX).collect()
    }

    /// What happened so far.
    pub fn counts(&self) -> &ResolverCounts {
        &self.shared.counts
    }
}

/// What asking around came to so far; outlives the future that the deadline ends.
#[derive(Default)]
struct Attempt {
    best: Option<Vec<u8>>,
    last_error: Option<std::io::Error>,
}

impl Attempt {
    /// Asks the servers in order, round by round, until one gives an answer that stands. Each round asks those that
    /// there are then: the host may be on another network by now.
    async fn run(
        &mut self,
        exchange: &Exchange<'_>,
        servers: impl Fn() -> Vec<SocketAddr>,
        rounds: [Duration; 3],
    ) {
        for patience in rounds {
            for server in servers() {
                match exchange.ask(server, patience).await {
                    Ok(Outcome::Answer(answer)) => {
                        self.best = Some(answer);
                        return;
                    }
                    // Another server may know better; if none does, this is what the guest gets.
                    Ok(Outcome::Fault(answer)) => {
                        self.best.get_or_insert(answer);
                    }
                    Ok(Outcome::Silence) => {}
                    Err(error) => self.last_error = Some(error),
                }
            }
            // Everyone has spoken: asking again brings nothing else. Refused connections come back at once;
            // the server may be starting, so they are worth another round after a breath.
            if self.best.is_some() {
                return;
            }
            tokio::time::sleep(BREATH).await;
        }
    }
}

/// Between rounds.
const BREATH: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests;
