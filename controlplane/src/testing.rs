//! What the unit tests share: directories that clean up after themselves, and a rig of a hub with a
//! clock by hand and scripted dataplanes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use vnet_proto::model::{
    CLOSED_ADDRESSES, Epoch, FlowKey, FlowSubject, GuardSet, LookupSubject, Miss, MissId, Name, Protocol,
    Subject, VmId,
};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;
use vnet_proto::v1::session_response::Message as Told;

use crate::clock::Clock;
use crate::hub::{Attachment, Candidate, Hub};
use crate::metrics::Metrics;
use crate::store::{self, Location, Writer};

/// A directory of its own under the temporary directory, removed with everything in it.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "vnet-t{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        crate::paths::ensure_private_dir(&path).expect("a fresh directory can be made");
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A hub whose time stands still.
pub(crate) struct Rig {
    pub(crate) hub: Arc<Hub>,
    pub(crate) clock: Clock,
    pub(crate) metrics: Arc<Metrics>,
}

impl Rig {
    /// In secure mode, with nothing kept.
    pub(crate) fn secure() -> Self {
        Self::start(&Location::Memory, true)
    }

    /// Without a policy or a mode.
    pub(crate) fn open() -> Self {
        Self::start(&Location::Memory, false)
    }

    pub(crate) fn start(location: &Location, secure_mode: bool) -> Self {
        let mut store = store::open(location).unwrap();
        let (snapshot, history) = (store.load().unwrap(), store.open_history().unwrap());
        let metrics = Arc::new(Metrics::default());
        let writer = Writer::start(store, None, Arc::clone(&metrics)).unwrap();
        let clock = Clock::manual(SystemTime::now());
        let hub = Hub::new(
            snapshot,
            history,
            writer,
            clock.clone(),
            Arc::clone(&metrics),
            secure_mode,
        )
        .unwrap();
        Self {
            hub: Arc::new(hub),
            clock,
            metrics,
        }
    }

    /// Lets time pass.
    pub(crate) fn pass(&self, time: Duration) {
        self.clock.advance(time);
        self.hub.tick();
    }

    pub(crate) fn apply(&self, document: &str) -> crate::hub::Applied {
        self.try_apply(document).unwrap()
    }

    pub(crate) fn try_apply(&self, document: &str) -> Result<crate::hub::Applied, crate::refusal::Refusal> {
        self.hub.apply_policy(Candidate {
            name: "",
            document,
            source: "p.yaml",
            etag: "",
            actor: "tester",
            validate_only: false,
            lists: &[],
            confirm_within: None,
        })
    }

    /// A dataplane with one VM.
    pub(crate) fn dataplane(&self, vm: &str) -> FakeDataplane {
        self.dataplane_with(hello(1, vec![vm_up(1, vm)]))
    }

    pub(crate) fn dataplane_with(&self, hello: v1::Hello) -> FakeDataplane {
        self.dataplane_of("", hello)
    }

    /// A dataplane of a process.
    pub(crate) fn dataplane_of(&self, process: &str, hello: v1::Hello) -> FakeDataplane {
        let attachment = self.hub.attach(hello, process).unwrap();
        let mut dataplane = FakeDataplane {
            hub: Arc::clone(&self.hub),
            attachment,
            next_miss: 0,
            next_flow: 0,
        };
        let told = dataplane.told();
        let Some(Told::Welcome(welcome)) = told.into_iter().find(|t| matches!(t, Told::Welcome(_))) else {
            panic!("no welcome");
        };
        assert!(welcome.epoch.is_some());
        dataplane
    }
}

pub(crate) fn hello(boot: u8, vms: Vec<v1::VmUp>) -> v1::Hello {
    v1::Hello {
        protocol_version: 1,
        dataplane: format!("dp{boot}"),
        boot_id: vec![boot; 16],
        network: format!("net{boot}"),
        subnet: "192.168.127.0/24".to_owned(),
        gateway: "192.168.127.1".to_owned(),
        host_alias: "192.168.127.254".to_owned(),
        vms,
        capabilities: vec![CLOSED_ADDRESSES.to_owned()],
        ..Default::default()
    }
}

pub(crate) fn vm_up(handle: u32, name: &str) -> v1::VmUp {
    v1::VmUp {
        vm: handle,
        name: name.to_owned(),
        attached: true,
        ..Default::default()
    }
}

pub(crate) fn flow(destination: &str, names: &[&str]) -> Subject {
    let peer: std::net::SocketAddr = destination.parse().unwrap();
    Subject::Flow(FlowSubject {
        key: FlowKey {
            protocol: Protocol::Tcp,
            guest: "192.168.127.2:40000".parse().unwrap(),
            peer,
        },
        dialled: peer.ip(),
        names: names.iter().map(|n| n.parse::<Name>().unwrap()).collect(),
        guards: GuardSet::EMPTY,
        peer_vm: None,
    })
}

pub(crate) fn lookup(name: &str, query_type: u16) -> Subject {
    Subject::Lookup(LookupSubject::new(name.parse().unwrap(), query_type))
}

/// An alias in the answer to a lookup.
pub(crate) fn alias(name: &str) -> Subject {
    Subject::Lookup(LookupSubject::alias(name.parse().unwrap(), 1))
}

/// A dataplane that says what a test tells it to, without a stream.
pub(crate) struct FakeDataplane {
    hub: Arc<Hub>,
    attachment: Attachment,
    next_miss: u64,
    next_flow: u64,
}

impl FakeDataplane {
    pub(crate) fn say(&self, message: Message) {
        self.hub.handle(self.attachment.key, message).unwrap();
    }

    pub(crate) fn try_say(&self, message: Message) -> Result<(), tonic::Status> {
        self.hub.handle(self.attachment.key, message)
    }

    /// Everything that it was told since the last look.
    pub(crate) fn told(&mut self) -> Vec<Told> {
        let mut told = Vec::new();
        while let Ok(response) = self.attachment.outbox.try_recv() {
            told.extend(response.message);
        }
        told
    }

    pub(crate) fn miss(&mut self, subject: Subject) -> MissId {
        self.next_miss += 1;
        let miss = MissId(self.next_miss);
        self.announce(miss, 1, subject);
        miss
    }

    pub(crate) fn announce(&self, id: MissId, vm: u32, subject: Subject) {
        let miss = Miss {
            id,
            vm: VmId(vm),
            subject,
            hold: Duration::from_secs(30),
            held: 1,
        };
        self.say(Message::Miss(miss.to_message(None)));
    }

    /// Misses, and expects a verdict at once.
    pub(crate) fn verdict(&mut self, subject: Subject) -> v1::Verdict {
        let miss = self.miss(subject);
        let verdict = verdicts(&self.told()).into_iter().find(|v| v.miss_id == miss.0);
        verdict.expect("a verdict at once")
    }

    /// Misses, and expects to be held; answers the request's id.
    pub(crate) fn held(&mut self, subject: Subject) -> (MissId, String) {
        let miss = self.miss(subject);
        let held = self.told().into_iter().find_map(|told| match told {
            Told::Held(held) if held.miss_id == miss.0 => Some(held.pending_id),
            _ => None,
        });
        (miss, held.expect("to be held"))
    }

    /// Opens a flow under an epoch.
    pub(crate) fn open(&mut self, subject: &Subject, epoch: Option<Epoch>, grant: &str) -> u64 {
        self.open_of(MissId(1), subject, epoch, grant)
    }

    /// Opens the flow of a miss.
    pub(crate) fn open_of(
        &mut self,
        miss: MissId,
        subject: &Subject,
        epoch: Option<Epoch>,
        grant: &str,
    ) -> u64 {
        let Subject::Flow(flow) = subject else {
            panic!("not a flow")
        };
        let opened = v1::FlowOpened {
            epoch: epoch.map(Into::into),
            grant_id: grant.to_owned(),
            miss_id: miss.0,
            names: flow.names.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        self.open_as(flow, opened)
    }

    /// Opens a flow as a verdict says.
    pub(crate) fn open_by(&mut self, subject: &Subject, verdict: &v1::Verdict) -> u64 {
        let Subject::Flow(flow) = subject else {
            panic!("not a flow")
        };
        let opened = v1::FlowOpened {
            epoch: verdict.epoch,
            grant_id: verdict.grant_id.clone(),
            miss_id: verdict.miss_id,
            names: verdict.names.clone(),
            ..Default::default()
        };
        self.open_as(flow, opened)
    }

    fn open_as(&mut self, flow: &FlowSubject, opened: v1::FlowOpened) -> u64 {
        self.next_flow += 1;
        self.say(Message::FlowOpened(v1::FlowOpened {
            flow_id: self.next_flow,
            vm: 1,
            subject: Some(flow.into()),
            ..opened
        }));
        self.next_flow
    }

    /// Acknowledges every Revoke and Cut among these; a Cut with the flows that it names.
    pub(crate) fn acknowledge(&self, told: &[Told]) {
        for message in told {
            let (command_id, cut_flows) = match message {
                Told::Revoke(revoke) => (revoke.command_id, 0),
                Told::Cut(cut) => (cut.command_id, cut.flow_ids.len() as u64),
                _ => continue,
            };
            self.say(Message::Ack(v1::Ack {
                command_id,
                cut_flows,
                ..Default::default()
            }));
        }
    }

    /// How the hub ended the session, if it did.
    pub(crate) fn ended(&mut self) -> Option<tonic::Status> {
        self.attachment.end.try_recv().ok()
    }

    pub(crate) fn lose(&self) {
        self.hub.detach(self.attachment.key);
    }
}

pub(crate) fn verdicts(told: &[Told]) -> Vec<v1::Verdict> {
    told.iter()
        .filter_map(|t| {
            if let Told::Verdict(v) = t {
                Some(v.clone())
            } else {
                None
            }
        })
        .collect()
}

pub(crate) fn cuts(told: &[Told]) -> Vec<u64> {
    let mut flows: Vec<u64> = told
        .iter()
        .flat_map(|t| {
            if let Told::Cut(cut) = t {
                cut.flow_ids.clone()
            } else {
                Vec::new()
            }
        })
        .collect();
    flows.sort_unstable();
    flows
}
