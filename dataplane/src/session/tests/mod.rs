//! What the session's tests share: a router that records, zones that remember, messages of both sides.

mod capture;
mod rules;
mod stream;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;
use vnet_proto::model::{
    CommandId, Epoch, FlowKey, FlowSubject, GuardSet, Miss, Name, Protocol, Reason, Subject, VmId,
};
use vnet_proto::v1;
use vnet_proto::v1::session_response::Message as Response;

use crate::capture::{Capture, CaptureSpec};
use crate::descriptors::Descriptors;
use crate::forward::Forwards;
use crate::guards::{Guards, HostAddresses};
use crate::message::{FlowOpened, Input, Order, Report, Router, VmUp, flow_id, miss_id};
use crate::metrics::Metrics;
use crate::session::{Captures, Commands, Identity, Refusal, Zones};
use crate::zone::{Zone, ZoneRecord};

/// Guests that can be added and removed, and every order that they were handed.
#[derive(Default)]
pub(super) struct Recorder {
    guests: Mutex<BTreeSet<VmId>>,
    orders: Mutex<Vec<(VmId, Order)>>,
    /// Guests that were told of a forward's end, and for which command.
    closings: Mutex<Vec<(VmId, CommandId)>>,
    news: Notify,
}

impl Recorder {
    fn with(guests: &[u32]) -> Arc<Self> {
        let recorder = Self::default();
        recorder
            .guests
            .lock()
            .unwrap()
            .extend(guests.iter().copied().map(VmId));
        Arc::new(recorder)
    }

    fn remove(&self, vm: VmId) {
        self.guests.lock().unwrap().remove(&vm);
    }

    /// The orders so far, which are then forgotten.
    fn take(&self) -> Vec<(VmId, Order)> {
        std::mem::take(&mut self.orders.lock().unwrap())
    }

    /// Waits until an order passes the test.
    async fn wait_for(&self, wanted: impl Fn(&Order) -> bool) {
        let found = async {
            loop {
                let news = self.news.notified();
                if self.orders.lock().unwrap().iter().any(|(_, order)| wanted(order)) {
                    return;
                }
                news.await;
            }
        };
        tokio::time::timeout(PATIENCE, found)
            .await
            .expect("the order comes");
    }
}

impl Router for Recorder {
    fn send(&self, vm: VmId, input: Input) -> bool {
        let there = self.guests.lock().unwrap().contains(&vm);
        match input {
            Input::Order(order) if there => {
                self.orders.lock().unwrap().push((vm, order));
                self.news.notify_one();
            }
            Input::IngressClosed { command, .. } if there => {
                self.closings.lock().unwrap().push((vm, command));
            }
            _ => {}
        }
        there
    }

    fn broadcast(&self, order: &Order) -> Vec<VmId> {
        let vms = self.vms();
        for vm in &vms {
            self.send(*vm, Input::Order(order.clone()));
        }
        vms
    }

    fn vms(&self) -> Vec<VmId> {
        self.guests.lock().unwrap().iter().copied().collect()
    }

    fn guest_at(&self, _address: IpAddr) -> Option<VmId> {
        None
    }

    fn seek(&self, _address: IpAddr) -> bool {
        false
    }

    fn is_open(&self) -> bool {
        false
    }
}

/// Zones without lookups.
#[derive(Default)]
pub(super) struct ZoneList(Mutex<Vec<Zone>>);

impl Zones for ZoneList {
    fn zones(&self) -> Vec<Zone> {
        self.0.lock().unwrap().clone()
    }

    fn set_zone(&self, zone: Zone) -> Result<(), Refusal> {
        self.0.lock().unwrap().push(zone);
        Ok(())
    }

    fn merge_zone(&self, mut zone: Zone) -> Result<Zone, Refusal> {
        let mut zones = self.0.lock().unwrap();
        for known in zones.extract_if(.., |known| known.name == zone.name) {
            zone.records.extend(known.records);
        }
        zones.push(zone.clone());
        Ok(zone)
    }

    fn remove_records(&self, name: Option<&Name>, records: &[ZoneRecord]) -> Result<Zone, Refusal> {
        let mut zones = self.0.lock().unwrap();
        let zone = zones.iter_mut().find(|zone| zone.name.as_ref() == name).unwrap();
        zone.records.retain(|record| !records.contains(record));
        Ok(zone.clone())
    }

    fn delete_zone(&self, name: Option<&Name>) -> Result<(), Refusal> {
        let mut zones = self.0.lock().unwrap();
        let before = zones.len();
        zones.retain(|zone| zone.name.as_ref() != name);
        if zones.len() == before {
            return Err(Refusal::new(tonic::Code::NotFound, "there is no such zone"));
        }
        Ok(())
    }
}

/// Captures of guest 1, without guests.
#[derive(Default)]
pub(super) struct CaptureList(Mutex<Vec<Arc<Capture>>>);

impl CaptureList {
    fn all(&self) -> Vec<Arc<Capture>> {
        self.0.lock().unwrap().clone()
    }
}

impl Captures for CaptureList {
    fn start_capture(
        &self,
        vm: VmId,
        spec: CaptureSpec,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Arc<Capture>, Refusal> {
        if vm != VmId(1) {
            return Err(Refusal::new(
                tonic::Code::NotFound,
                "there is no guest of this handle",
            ));
        }
        let capture = Capture::new(spec, wake);
        self.0.lock().unwrap().push(Arc::clone(&capture));
        Ok(capture)
    }
}

fn identity() -> Identity {
    Identity {
        dataplane: "dp".into(),
        boot_id: [7; 16],
        network: "net".into(),
        subnet: "192.168.127.0/24".parse().unwrap(),
        subnet_ipv6: Some("fd00::/64".parse().unwrap()),
        gateway: "192.168.127.1".parse().unwrap(),
        host_alias: Some("192.168.127.254".parse().unwrap()),
        nat: vec![("198.51.100.1".parse().unwrap(), "::1".parse().unwrap())],
    }
}

fn guards() -> Arc<Guards> {
    Arc::new(Guards::new(
        HostAddresses::new(["198.51.100.7".parse().unwrap()], []),
        [],
    ))
}

fn commands(router: &Arc<Recorder>, metrics: &Arc<Metrics>) -> Commands {
    let runtime = tokio::runtime::Handle::current();
    let router = Arc::clone(router) as Arc<dyn Router>;
    Commands {
        forwards: Forwards::new(router, Arc::clone(metrics), Descriptors::new(1 << 20), runtime),
        zones: Arc::<ZoneList>::default(),
        captures: Arc::<CaptureList>::default(),
    }
}

fn epoch(counter: u64) -> Epoch {
    Epoch {
        incarnation: 0xabcd,
        counter,
    }
}

fn down(vm: u32) -> Report {
    Report::VmDown {
        vm: VmId(vm),
        link_error: None,
    }
}

fn vm_up(vm: u32) -> Report {
    Report::VmUp(VmUp {
        vm: VmId(vm),
        name: format!("vm{vm}"),
        labels: [("team".to_owned(), "a".to_owned())].into(),
        transport: "qemu",
        own_policy: None,
        mode: None,
        ec2_metadata_access: false,
        resolver_patience: Duration::from_secs(4),
        attached_at: SystemTime::UNIX_EPOCH,
    })
}

fn subject(port: u16) -> FlowSubject {
    FlowSubject {
        key: FlowKey {
            protocol: Protocol::Tcp,
            guest: "192.168.127.2:40000".parse().unwrap(),
            peer: std::net::SocketAddr::new("192.0.2.1".parse().unwrap(), port),
        },
        dialled: "192.0.2.1".parse().unwrap(),
        names: Vec::new(),
        guards: GuardSet::EMPTY,
        peer_vm: None,
    }
}

fn miss(vm: u32, sequence: u64) -> Report {
    Report::Miss(Miss {
        id: miss_id(VmId(vm), sequence),
        vm: VmId(vm),
        subject: Subject::Flow(subject(443)),
        hold: Duration::from_secs(30),
        held: 1,
    })
}

fn flow(vm: u32, sequence: u64) -> Report {
    Report::FlowOpened(FlowOpened {
        flow: flow_id(VmId(vm), sequence),
        vm: VmId(vm),
        ingress: false,
        subject: subject(443),
        epoch: Some(epoch(1)),
        grant: String::new(),
        reason: Reason::new("rule", "rules[0]", "rules[0] allows it"),
        would_deny: false,
        opened_at: SystemTime::UNIX_EPOCH,
        miss: None,
        names: Vec::new(),
    })
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn welcome(epoch: Epoch, heartbeat: Duration) -> v1::SessionResponse {
    response(Response::Welcome(v1::Welcome {
        epoch: Some(epoch.into()),
        lease: seconds(60),
        heartbeat_interval: heartbeat.try_into().ok(),
        hold: seconds(30),
        vms: Vec::new(),
        closed_addresses: vec!["127.0.0.1:7443".into()],
        judges_aliases: true,
    }))
}

fn verdict(vm: u32, sequence: u64, epoch: Epoch) -> v1::Verdict {
    v1::Verdict {
        miss_id: miss_id(VmId(vm), sequence).0,
        action: v1::Action::Allow.into(),
        r#match: Some(v1::verdict::Match::Flow(v1::FlowMatch {
            protocol: v1::Protocol::Tcp.into(),
            prefix: vec![192, 0, 2, 1],
            prefix_length: 32,
            first_port: 443,
            last_port: 443,
            names_consulted: false,
        })),
        epoch: Some(epoch.into()),
        ..v1::Verdict::default()
    }
}

fn response(message: Response) -> v1::SessionResponse {
    v1::SessionResponse {
        message: Some(message),
    }
}

const PATIENCE: Duration = Duration::from_secs(10);
