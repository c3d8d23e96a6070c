//! How a connection of the host's side is let in to a guest, whether it came to a forward or through a tunnel.
//!
//! The guest that has the target's address is looked up for each connection. Where none has it but one might, as with
//! an address that was set by hand in a guest which only serves and never spoke, guests are asked by ARP (RFC 826) and
//! the connection waits for the answer, as in any network.
//!
//! One address is sought once at a time, whatever number waits for it, and not again for [`LOST_FOR`] where nobody has
//! it. Who waits for an answer takes no place of those that wait for a guest's driver. Each passes its [`Gate`] when a
//! guest is handed it, not before: what it came through may be closed meanwhile, and who closes it is to be sure.

use std::net::IpAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;
use tokio::time::Instant;
use vnet_proto::model::VmId;

use crate::message::{Ingress, Input, Origin, Router, Waiting};
use crate::metrics::{ForwardRefusal, Metrics, TunnelRefusal};

/// How often guests are asked whose an address is.
const QUESTIONS: u32 = 3;
/// How long an answer to one question is waited for.
const QUESTION_PATIENCE: Duration = Duration::from_millis(320);
/// How long between looks for the answer.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long an address that nobody has is not asked about again.
const LOST_FOR: Duration = Duration::from_secs(1);
/// Connections that wait for one address.
const SEEKERS_MAX: usize = 16;
/// Addresses that are sought, or are known to be nobody's.
const SOUGHT_MAX: usize = 64;

/// What a connection came through.
pub(crate) trait Gate: Send + 'static {
    /// Calls `hand_over` if it is open still, and keeps it from being closed meanwhile.
    fn pass(&self, hand_over: &mut dyn FnMut());
}

/// Lets connections in to the guests of one network. Clones share the limits.
#[derive(Clone)]
pub(crate) struct Admission(Arc<Shared>);

struct Shared {
    router: Arc<dyn Router>,
    metrics: Arc<Metrics>,
    waiting: Arc<AtomicUsize>,
    waiting_max: usize,
    sought: Mutex<AHashMap<IpAddr, Sought>>,
}

enum Sought {
    /// These wait for the answer.
    By(Vec<Arrival>),
    /// Nobody has it, as far as was known then.
    Lost(Instant),
}

impl Sought {
    fn seekers(&self) -> usize {
        match self {
            Self::By(seekers) => seekers.len(),
            Self::Lost(_) => 0,
        }
    }
}

type Arrival = (Ingress, Box<dyn Gate>);

/// Why one is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("no guest has the address")]
    NoGuest,
    #[error("too many wait to be let in")]
    Backlog,
    #[error("what it came through is closed")]
    Closed,
}

impl Admission {
    /// To the guests of this router. So many connections may wait for a guest's driver, and as many for one to be found.
    pub(crate) fn new(router: Arc<dyn Router>, metrics: Arc<Metrics>, waiting_max: usize) -> Self {
        Self(Arc::new(Shared {
            router,
            metrics,
            waiting: Arc::default(),
            waiting_max,
            sought: Mutex::default(),
        }))
    }

    /// Hands a connection to the guest at its target, now or soon, or refuses it: that is counted, and the connection
    /// closed. Called where tasks can be spawned. Its `waiting` is set here.
    pub(crate) fn admit(&self, ingress: Ingress, gate: impl Gate) {
        let (address, port) = (ingress.target.ip(), ingress.target.port());
        let shared = &self.0;
        if port == 0 {
            shared.refuse(&ingress, Refusal::NoGuest);
        } else if let Some(vm) = shared.router.guest_at(address) {
            shared.hand_over(vm, (ingress, Box::new(gate)));
        } else if shared.wait(address, (ingress, Box::new(gate))) {
            tokio::spawn(Arc::clone(shared).seek(address));
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, AHashMap<IpAddr, Sought>> {
        self.sought.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a connection among those that wait for an address, or refuses it; true for the first, with which the
    /// search begins.
    fn wait(&self, address: IpAddr, arrival: Arrival) -> bool {
        let now = Instant::now();
        let mut sought = self.lock();
        let waiting: usize = sought.values().map(Sought::seekers).sum();
        let refusal = match sought.get_mut(&address) {
            Some(Sought::Lost(until)) if now < *until => Refusal::NoGuest,
            _ if waiting >= self.waiting_max => Refusal::Backlog,
            Some(Sought::By(seekers)) if seekers.len() >= SEEKERS_MAX => Refusal::Backlog,
            Some(Sought::By(seekers)) => {
                seekers.push(arrival);
                return false;
            }
            Some(Sought::Lost(_)) | None => {
                if sought.len() >= SOUGHT_MAX {
                    sought.retain(|_, one| !matches!(one, Sought::Lost(until) if *until <= now));
                }
                if sought.len() >= SOUGHT_MAX {
                    Refusal::Backlog
                } else if self.router.seek(address) {
                    sought.insert(address, Sought::By(vec![arrival]));
                    return true;
                } else {
                    Refusal::NoGuest
                }
            }
        };
        drop(sought);
        self.refuse(&arrival.0, refusal);
        false
    }

    /// Looks for the answer to the question that was asked, asks again, and serves all that wait for it.
    async fn seek(self: Arc<Self>, address: IpAddr) {
        let found = self.find(address).await;
        let mut sought = self.lock();
        let seekers = sought.remove(&address);
        if found.is_none() {
            sought.insert(address, Sought::Lost(Instant::now() + LOST_FOR));
        }
        drop(sought);
        let Some(Sought::By(seekers)) = seekers else {
            return;
        };
        for arrival in seekers {
            match found {
                Some(vm) => self.hand_over(vm, arrival),
                None => self.refuse(&arrival.0, Refusal::NoGuest),
            }
        }
    }

    async fn find(&self, address: IpAddr) -> Option<VmId> {
        for question in 1..=QUESTIONS {
            let until = Instant::now() + QUESTION_PATIENCE;
            while Instant::now() < until {
                tokio::time::sleep(LOOK_EVERY).await;
                if let Some(vm) = self.router.guest_at(address) {
                    return Some(vm);
                }
            }
            if question < QUESTIONS && !self.router.seek(address) {
                break;
            }
        }
        None
    }

    fn hand_over(&self, vm: VmId, (mut ingress, gate): Arrival) {
        let Some(waiting) = Waiting::enter(&self.waiting, self.waiting_max) else {
            return self.refuse(&ingress, Refusal::Backlog);
        };
        ingress.waiting = waiting;
        let origin = ingress.origin;
        let mut ingress = Some(ingress);
        gate.pass(&mut || {
            let Some(ingress) = ingress.take() else { return };
            // Before the guest could have it. One that was gone in that moment is counted both ways.
            match origin {
                Origin::Forward(_) => self.metrics.forward_connections.increment(),
                Origin::Tunnel => self.metrics.tunnels.increment(),
            }
            if !self.router.send(vm, Input::Ingress(ingress)) {
                self.count(origin, Refusal::NoGuest);
            }
        });
        if let Some(ingress) = ingress {
            self.refuse(&ingress, Refusal::Closed);
        }
    }

    fn refuse(&self, ingress: &Ingress, why: Refusal) {
        tracing::debug!(target_address = %ingress.target, reason = %why, "a connection is not let in");
        self.count(ingress.origin, why);
        // Who connected to a port learns that nobody serves there; in a tunnel, an end is all that is said.
        if matches!(ingress.origin, Origin::Forward(_)) {
            ingress.stream.set_reset();
        }
    }

    fn count(&self, origin: Origin, why: Refusal) {
        match origin {
            Origin::Forward(_) => {
                let cause = match why {
                    Refusal::NoGuest => ForwardRefusal::NoGuest,
                    Refusal::Backlog => ForwardRefusal::Backlog,
                    Refusal::Closed => ForwardRefusal::Closed,
                };
                self.metrics.forward_refusals.of(cause).increment();
            }
            Origin::Tunnel => {
                let cause = match why {
                    Refusal::NoGuest => TunnelRefusal::NoGuest,
                    Refusal::Backlog => TunnelRefusal::Backlog,
                    Refusal::Closed => TunnelRefusal::Closed,
                };
                self.metrics.tunnel_refusals.of(cause).increment();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::SocketAddr;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::message::{ForwardId, Order};

    const PATIENCE: Duration = Duration::from_secs(5);

    /// A network whose guests show an address after so many questions, if at all.
    #[derive(Default)]
    struct Shy {
        asked: Mutex<Vec<IpAddr>>,
        answers_at: usize,
        handed: Mutex<Vec<Ingress>>,
    }

    impl Router for Shy {
        fn send(&self, _: VmId, input: Input) -> bool {
            if let Input::Ingress(ingress) = input {
                self.handed.lock().unwrap().push(ingress);
            }
            true
        }
        fn broadcast(&self, _: &Order) -> Vec<VmId> {
            Vec::new()
        }
        fn vms(&self) -> Vec<VmId> {
            Vec::new()
        }
        fn guest_at(&self, _: IpAddr) -> Option<VmId> {
            let asked = self.asked.lock().unwrap().len();
            (self.answers_at > 0 && asked >= self.answers_at).then_some(VmId(1))
        }
        fn seek(&self, address: IpAddr) -> bool {
            self.asked.lock().unwrap().push(address);
            true
        }
        fn is_open(&self) -> bool {
            false
        }
    }

    struct Door(Arc<AtomicBool>);

    impl Gate for Door {
        fn pass(&self, hand_over: &mut dyn FnMut()) {
            if self.0.load(Ordering::Relaxed) {
                hand_over();
            }
        }
    }

    struct Given {
        router: Arc<Shy>,
        metrics: Arc<Metrics>,
        admission: Admission,
        door: Arc<AtomicBool>,
    }

    fn given(answers_at: usize, waiting_max: usize) -> Given {
        let router = Arc::new(Shy {
            answers_at,
            ..Shy::default()
        });
        let metrics: Arc<Metrics> = Arc::default();
        let admission = Admission::new(
            Arc::clone(&router) as Arc<dyn Router>,
            Arc::clone(&metrics),
            waiting_max,
        );
        Given {
            router,
            metrics,
            admission,
            door: Arc::new(AtomicBool::new(true)),
        }
    }

    impl Given {
        /// Somebody connects to an address; the client's end.
        fn connect(&self, host: u8, origin: Origin) -> UnixStream {
            let (client, stream) = UnixStream::pair().unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let ingress = Ingress {
                stream: stream.into(),
                early: Vec::new(),
                target: SocketAddr::from(([192, 168, 127, host], 80)),
                client: None,
                origin,
                waiting: Waiting::default(),
            };
            self.admission.admit(ingress, Door(Arc::clone(&self.door)));
            client
        }

        fn forward(&self, host: u8) -> UnixStream {
            self.connect(host, Origin::Forward(ForwardId(1)))
        }

        fn refused(&self, cause: ForwardRefusal) -> u64 {
            self.metrics.forward_refusals.of(cause).get()
        }

        fn handed(&self) -> usize {
            self.router.handed.lock().unwrap().len()
        }

        fn asked(&self) -> usize {
            self.router.asked.lock().unwrap().len()
        }
    }

    async fn pass(time: Duration) {
        tokio::time::sleep(time).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_is_shown_at_the_third_question_serves_all_that_wait_for_it() {
        let given = given(3, 8);
        let _clients = [given.forward(7), given.forward(7)];
        let _tunnel = given.connect(7, Origin::Tunnel);
        assert_eq!((given.asked(), given.handed()), (1, 0));
        pass(QUESTION_PATIENCE * QUESTIONS).await;
        assert_eq!((given.asked(), given.handed()), (3, 3));
        assert_eq!(
            (
                given.metrics.forward_connections.get(),
                given.metrics.tunnels.get()
            ),
            (2, 1)
        );
        assert!(given.admission.0.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_has_is_asked_for_thrice_and_not_again_for_a_while() {
        let given = given(0, 8);
        let mut client = given.forward(7);
        let mut tunnel = given.connect(7, Origin::Tunnel);
        pass(QUESTION_PATIENCE * QUESTIONS + LOOK_EVERY).await;
        assert_eq!((given.asked(), given.refused(ForwardRefusal::NoGuest)), (3, 1));
        assert_eq!(given.metrics.tunnel_refusals.of(TunnelRefusal::NoGuest).get(), 1);
        assert_eq!(tunnel.read(&mut [0]).unwrap(), 0, "it is closed");
        assert!(!matches!(client.read(&mut [0]), Ok(1..)), "so is this");
        let _refused = given.forward(7);
        assert_eq!((given.asked(), given.refused(ForwardRefusal::NoGuest)), (3, 2));
        pass(LOST_FOR).await;
        let _sought = given.forward(7);
        assert_eq!((given.asked(), given.refused(ForwardRefusal::NoGuest)), (4, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_nobody_is_bounded_and_keeps_no_other_out() {
        let given = given(0, 256);
        let clients: Vec<_> = (0..SEEKERS_MAX + 3).map(|_| given.forward(7)).collect();
        assert_eq!((given.asked(), given.refused(ForwardRefusal::Backlog)), (1, 3));
        // Of other addresses, as many as may be.
        let others: Vec<_> = (8..8 + SOUGHT_MAX as u8)
            .map(|host| given.forward(host))
            .collect();
        assert_eq!(
            (given.asked(), given.refused(ForwardRefusal::Backlog)),
            (SOUGHT_MAX, 4)
        );
        assert_eq!(given.admission.0.waiting.load(Ordering::Relaxed), 0);
        pass(QUESTION_PATIENCE * QUESTIONS + LOST_FOR * 2).await;
        drop((clients, others));
        // What is known of them is forgotten when there is need.
        let before = given.refused(ForwardRefusal::Backlog);
        let _client = given.forward(200);
        assert_eq!(given.refused(ForwardRefusal::Backlog), before);
        assert_eq!(given.admission.0.lock().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn all_that_wait_for_an_answer_are_bounded_together() {
        let given = given(0, 5);
        let _clients: Vec<_> = (7..13).map(|host| given.forward(host)).collect();
        assert_eq!((given.asked(), given.refused(ForwardRefusal::Backlog)), (5, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_closed_while_its_guest_is_sought_lets_nobody_in() {
        let given = given(2, 8);
        let mut client = given.forward(7);
        let mut tunnel = given.connect(7, Origin::Tunnel);
        given.door.store(false, Ordering::Relaxed);
        pass(QUESTION_PATIENCE * QUESTIONS).await;
        assert_eq!((given.asked(), given.handed()), (2, 0));
        assert_eq!(given.refused(ForwardRefusal::Closed), 1);
        assert_eq!(given.metrics.tunnel_refusals.of(TunnelRefusal::Closed).get(), 1);
        assert!(!matches!(client.read(&mut [0]), Ok(1..)));
        assert_eq!(tunnel.read(&mut [0]).unwrap(), 0);
        assert_eq!(
            given.admission.0.waiting.load(Ordering::Relaxed),
            0,
            "its place is free"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn places_for_a_guests_driver_are_given_when_it_is_found() {
        let given = given(1, 2);
        let _clients: Vec<_> = (0..3).map(|_| given.forward(7)).collect();
        pass(QUESTION_PATIENCE).await;
        assert_eq!((given.handed(), given.refused(ForwardRefusal::Backlog)), (2, 1));
        given.router.handed.lock().unwrap().clear();
        let _client = given.forward(7);
        assert_eq!(given.handed(), 1);
    }
}
