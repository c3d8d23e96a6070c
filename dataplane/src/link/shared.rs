//! A Unix datagram socket that VMs share: vfkit, krunkit, QEMU's `-netdev dgram`.
//!
//! A thread reads it, many datagrams a call where the system can, and tells VMs apart by the address that
//! each sends from. A new address is a new guest; what an address sends goes to its `Mailbox`, from which
//! its driver takes it. vfkit may send the four bytes `VFKT` first, which carry nothing. Who sends from no
//! address cannot be answered, and is counted. The thread waits for nobody: a VM that is slow or stopped has a
//! full mailbox and loses its own frames.
//!
//! A VM that is connected to the socket keeps it ([`super::datagram`] says why): the path is given to another
//! socket with a thread of its own, and the first serves those that are connected to it until they are gone.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use socket2::{Socket, Type};

use crate::link::datagram::{DatagramLink, Peer, SEND_PATIENCE, Way};
use crate::link::listen::{Keeper, SocketFile, bind_private};
use crate::link::mailbox::Mailbox;
use crate::link::serve::Entrance;
use crate::link::stream::widen;
use crate::link::{FRAME_BYTES_MAX, Link, would_block};
use crate::metrics::LinkRefusal;
use crate::network::{GuestSpec, Network};

/// What vfkit says first, for nothing.
const MAGIC: &[u8] = b"VFKT";
/// How long the thread rests after an error of the system.
const REST: Duration = Duration::from_millis(100);
/// How often a socket without a word looks whether it is of any use.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Datagrams that one call takes at most.
const BATCH: usize = if cfg!(target_os = "linux") { 32 } else { 1 };
/// Room for a datagram. A cache line more than the longest frame, so that the frames of a batch do not all
/// compete for the same place of the cache.
const SLOT_BYTES: usize = FRAME_BYTES_MAX + 64;

/// Listens at a path, and serves every VM that sends there.
///
/// # Errors
/// The system's, as an address in use.
pub fn datagrams(network: &Arc<Network>, path: &Path, spec: GuestSpec) -> io::Result<SocketFile> {
    let (socket, file) = bind_private(path, Type::DGRAM)?;
    let place = Arc::new(Place {
        path: path.to_owned(),
        keeper: file.keeper(),
        entrance: Entrance::new(network, spec),
        vms: Vms::default(),
    });
    Server::start(place, socket)?;
    Ok(file)
}

/// What the sockets of one path have in common.
struct Place {
    path: PathBuf,
    keeper: Keeper,
    entrance: Arc<Entrance>,
    vms: Vms,
}

/// One socket, and its thread.
struct Server {
    place: Arc<Place>,
    socket: Arc<Socket>,
    /// The path is this socket's still.
    listens: bool,
}

impl Server {
    fn start(place: Arc<Place>, socket: Socket) -> io::Result<()> {
        widen(&socket);
        socket.set_write_timeout(Some(SEND_PATIENCE))?;
        socket.set_read_timeout(Some(LOOK_INTERVAL))?;
        let mut server = Self {
            place,
            socket: Arc::new(socket),
            listens: true,
        };
        thread::Builder::new()
            .name("datagrams".to_owned())
            .spawn(move || server.run())?;
        Ok(())
    }

    /// Until nobody can come to this socket any more, and nobody is there.
    fn run(&mut self) {
        let mut batch = Batch::new();
        while self.listens || Arc::strong_count(&self.socket) > 1 {
            match batch.receive(&self.socket) {
                Ok(()) => self.deliver(&batch),
                Err(error) if would_block(&error) => {}
                Err(error) => {
                    self.place.entrance.refuse(LinkRefusal::System, &error);
                    thread::sleep(REST);
                }
            }
        }
    }

    /// Leaves this socket to the VM that is connected to it, and the path to another.
    fn step_aside(&mut self) {
        let place = Arc::clone(&self.place);
        let keeper = place.keeper.clone();
        let next = keeper.unless_removed(&self.place.path, || {
            Self::start(place, bind_over(&self.place.path)?)
        });
        match next {
            Ok(()) => self.listens = false,
            // They share this one.
            Err(error) => tracing::warn!(path = %self.place.path.display(), %error, "VMs share a socket"),
        }
    }
}

/// A socket that takes over a path in one step, so that nobody ever finds nothing there.
fn bind_over(path: &Path) -> io::Result<Socket> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    // Nobody else's: short, as an address has little room, and not to be foreseen.
    let name = format!(".{pid:x}-{number:x}-{:08x}", u32::from_ne_bytes(random));
    let beside = path.with_file_name(name);
    // The file is gone from there by the time that it would be removed.
    let (socket, _file) = bind_private(&beside, Type::DGRAM)?;
    std::fs::rename(&beside, path)?;
    Ok(socket)
}

/// VMs by address.
#[derive(Default)]
struct Vms(Mutex<HashMap<Box<[u8]>, Vm>>);

/// A VM, as long as its guest is there.
#[derive(Clone)]
struct Vm {
    mailbox: Arc<Mailbox>,
    peer: Arc<Peer>,
    /// The socket that it is connected to, which was left to it.
    connected_to: Option<Weak<Socket>>,
}

impl Vm {
    /// Whether what came by this socket cannot be of it: it sends to the one that it is connected to.
    fn is_elsewhere(&self, socket: &Arc<Socket>) -> bool {
        let own = self.connected_to.as_ref();
        own.is_some_and(|own| own.as_ptr() != Arc::as_ptr(socket))
    }
}

impl Vms {
    fn lock(&self) -> MutexGuard<'_, HashMap<Box<[u8]>, Vm>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the guests whose VM is gone, which their drivers would find out later. True while one of them is there.
    fn end_those_gone(&self) -> bool {
        // The system is asked without the lock, which those that end want.
        let vms: Vec<Vm> = self.lock().values().cloned().collect();
        let mut is_any = false;
        for Vm { mailbox, peer, .. } in &vms {
            if !mailbox.is_closed() && !peer.is_alive() {
                mailbox.close();
            }
            is_any |= mailbox.is_closed();
        }
        is_any
    }

    /// Forgets a VM, unless another has come to its address.
    fn forget(&self, address: &[u8], mailbox: &Arc<Mailbox>) {
        let mut vms = self.lock();
        if vms
            .get(address)
            .is_some_and(|found| Arc::ptr_eq(&found.mailbox, mailbox))
        {
            vms.remove(address);
        }
    }
}

impl Server {
    /// Hands every frame of a batch to its VM; those of one VM that came in a row together.
    fn deliver(&mut self, batch: &Batch) {
        let mut from = 0;
        while from < batch.received {
            let address = batch.address(from);
            let to = (from..batch.received)
                .find(|at| batch.address(*at) != address)
                .unwrap_or(batch.received);
            if address.is_empty() {
                for _ in from..to {
                    let why = "it sends from no address (bind its socket to a path)";
                    self.place.entrance.refuse(LinkRefusal::Unnamed, &why);
                }
            } else if let Some((mailbox, alone)) = self.mailbox(address) {
                let frames = (from..to).map(|at| batch.frame(at));
                mailbox.put(frames.filter(|frame| *frame != Some(MAGIC)), alone);
            }
            from = to;
        }
    }

    /// The mailbox of an address, whose VM is let in if it is new; and whether it is the only one.
    fn mailbox(&mut self, address: &[u8]) -> Option<(Arc<Mailbox>, bool)> {
        let vms = self.place.vms.lock();
        let count = vms.len();
        if let Some(vm) = vms.get(address) {
            if vm.is_elsewhere(&self.socket) {
                // One that was started anew at a name of Linux's, where no file tells.
                vm.mailbox.close();
            }
            return (!vm.mailbox.is_closed()).then(|| (Arc::clone(&vm.mailbox), count == 1));
        }
        drop(vms);
        let place = Arc::clone(&self.place);
        let admission = place.entrance.admit()?;
        let answered = Peer::new(address).and_then(|peer| Ok((peer.way(&self.socket)?, peer)));
        let (way, peer) = match answered {
            Ok((way, peer)) => (way, Arc::new(peer)),
            Err(error) => {
                place.entrance.refuse(LinkRefusal::Unnamed, &error);
                return None;
            }
        };
        // It may be one of them, started anew at another address: it would have a further name, and be rid of what goes
        // by the one that it had. What it says until they are gone is lost.
        if place.vms.end_those_gone() {
            return None;
        }
        let is_connected = cfg!(target_os = "linux") && matches!(way, Way::Shared(_));
        if self.listens && is_connected {
            self.step_aside();
        }
        let (mailbox, address) = (Arc::<Mailbox>::default(), Box::<[u8]>::from(address));
        let vm = Vm {
            mailbox: Arc::clone(&mailbox),
            peer: Arc::clone(&peer),
            connected_to: is_connected.then(|| Arc::downgrade(&self.socket)),
        };
        place.vms.lock().insert(address.clone(), vm);
        let link = DatagramLink::new(way, peer, Arc::clone(&mailbox));
        let own = Arc::clone(&mailbox);
        admission.attach_then(Link::Datagram(link), move || place.vms.forget(&address, &own));
        Some((mailbox, count == 0))
    }
}

/// Datagrams as they came, and who sent them.
struct Batch {
    bytes: Box<[u8]>,
    slots: [Slot; BATCH],
    received: usize,
}

#[derive(Clone, Copy)]
struct Slot {
    address: libc::sockaddr_un,
    address_bytes: usize,
    frame_bytes: usize,
    cut_off: bool,
}

impl Batch {
    fn new() -> Self {
        let slot = Slot {
            // SAFETY: a `sockaddr_un` is integers and arrays of them, for which zeros are valid.
            address: unsafe { std::mem::zeroed() },
            address_bytes: 0,
            frame_bytes: 0,
            cut_off: false,
        };
        Self {
            bytes: vec![0; BATCH * SLOT_BYTES].into_boxed_slice(),
            slots: [slot; BATCH],
            received: 0,
        }
    }

    /// Waits for a datagram, and takes those that are there with it.
    fn receive(&mut self, socket: &Socket) -> io::Result<()> {
        // SAFETY: both are plain C structures, for which zeros are valid: no buffers, no flags.
        let mut vectors: [libc::iovec; BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut headers: [Header; BATCH] = unsafe { std::mem::zeroed() };
        let bytes = self.bytes.chunks_exact_mut(SLOT_BYTES);
        for (((header, vector), slot), bytes) in headers
            .iter_mut()
            .zip(&mut vectors)
            .zip(&mut self.slots)
            .zip(bytes)
        {
            vector.iov_base = bytes.as_mut_ptr().cast();
            vector.iov_len = bytes.len();
            let message = message_of(header);
            message.msg_name = (&raw mut slot.address).cast();
            message.msg_namelen = size_of::<libc::sockaddr_un>() as libc::socklen_t;
            message.msg_iov = vector;
            message.msg_iovlen = 1;
        }
        // SAFETY: each header points to a buffer and an address of its own, with their lengths, which outlive
        // the call and are borrowed by nobody else meanwhile.
        self.received = unsafe { receive(socket, &mut headers) }?;
        for (header, slot) in headers.iter_mut().zip(&mut self.slots).take(self.received) {
            slot.frame_bytes = length_of(header);
            let message = message_of(header);
            slot.address_bytes = message.msg_namelen as usize;
            slot.cut_off = message.msg_flags & libc::MSG_TRUNC != 0;
        }
        Ok(())
    }

    /// The frame at this place. `None` when it was longer than any may be.
    fn frame(&self, at: usize) -> Option<&[u8]> {
        let slot = &self.slots[at];
        let bytes = &self.bytes[at * SLOT_BYTES..][..slot.frame_bytes.min(SLOT_BYTES)];
        (!slot.cut_off).then_some(bytes)
    }

    /// The path, or Linux's name, that the datagram at this place was sent from; empty for none.
    fn address(&self, at: usize) -> &[u8] {
        let slot = &self.slots[at];
        let path = &slot.address.sun_path;
        let length = slot
            .address_bytes
            .saturating_sub(std::mem::offset_of!(libc::sockaddr_un, sun_path))
            .min(path.len());
        // SAFETY: a `c_char` is a byte, whatever its sign, and the slice lives as long as the array.
        let bytes = unsafe { std::slice::from_raw_parts(path.as_ptr().cast::<u8>(), length) };
        if bytes.first() == Some(&0) {
            return if cfg!(target_os = "linux") { bytes } else { &[] };
        }
        // A path ends at its first zero, which may be counted or not.
        bytes.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

#[cfg(target_os = "linux")]
type Header = libc::mmsghdr;
#[cfg(not(target_os = "linux"))]
type Header = (libc::msghdr, usize);

#[cfg(target_os = "linux")]
fn message_of(header: &mut Header) -> &mut libc::msghdr {
    &mut header.msg_hdr
}

#[cfg(not(target_os = "linux"))]
fn message_of(header: &mut Header) -> &mut libc::msghdr {
    &mut header.0
}

#[cfg(target_os = "linux")]
fn length_of(header: &Header) -> usize {
    header.msg_len as usize
}

#[cfg(not(target_os = "linux"))]
fn length_of(header: &Header) -> usize {
    header.1
}

/// Waits for one datagram, and takes as many as are there and have a header. How many.
///
/// # Safety
/// What the headers point to must be valid for writes, and nobody else's.
#[cfg(target_os = "linux")]
unsafe fn receive(socket: &Socket, headers: &mut [Header; BATCH]) -> io::Result<usize> {
    // SAFETY: the caller vouches for the headers; their number is the array's; no timeout is given.
    let received = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            BATCH as libc::c_uint,
            libc::MSG_WAITFORONE as _,
            std::ptr::null_mut(),
        )
    };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// Waits for one datagram, and takes it. How many that is: one.
///
/// # Safety
/// What the headers point to must be valid for writes, and nobody else's.
#[cfg(not(target_os = "linux"))]
unsafe fn receive(socket: &Socket, headers: &mut [Header; BATCH]) -> io::Result<usize> {
    let (message, length) = &mut headers[0];
    // SAFETY: the caller vouches for what the header points to.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), message, 0) };
    *length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    Ok(1)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_path_is_taken_over_beside_whatever_else_is_in_its_directory() {
        let directory = std::env::temp_dir().join(format!("vnet-over{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let (ours, theirs) = (directory.join("ours"), directory.join("theirs"));
        let precious = directory.join(format!(".{}", std::process::id()));
        std::fs::write(&precious, "precious").unwrap();
        // Two at the same moment too, as of two networks of one process.
        std::thread::scope(|scope| {
            for path in [&ours, &theirs] {
                scope.spawn(move || {
                    let (_first, file) = bind_private(path, Type::DGRAM).unwrap();
                    for _ in 0..100 {
                        let next = bind_over(path).unwrap();
                        UnixDatagram::unbound().unwrap().send_to(b"x", path).unwrap();
                        assert_eq!((&next).read(&mut [0; 2]).unwrap(), 1);
                    }
                    std::mem::forget(file);
                });
            }
        });
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
        assert_eq!(
            std::fs::read_dir(&directory).unwrap().count(),
            3,
            "nothing is left"
        );
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn datagrams_come_in_batches_with_who_sent_them_and_how_long_they_were() {
        let directory = std::env::temp_dir().join(format!("vnet-batch{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let ours = directory.join("ours");
        let (socket, _file) = bind_private(&ours, Type::DGRAM).unwrap();
        let (short, long) = (directory.join("a"), directory.join("a-longer-name"));
        let (first, second) = (
            UnixDatagram::bind(&short).unwrap(),
            UnixDatagram::bind(&long).unwrap(),
        );
        let nameless = UnixDatagram::unbound().unwrap();
        let mut batch = Batch::new();
        let mut seen = Vec::new();
        // Twice, so that nothing of the first time is taken for the second's.
        for _ in 0..2 {
            first.send_to(b"one", &ours).unwrap();
            nameless.send_to(b"two", &ours).unwrap();
            second.send_to(&[], &ours).unwrap();
            second.send_to(&[7; FRAME_BYTES_MAX], &ours).unwrap();
            second.send_to(&[7; FRAME_BYTES_MAX + 65], &ours).unwrap();
            let before = seen.len();
            while seen.len() < before + 5 {
                batch.receive(&socket).unwrap();
                for at in 0..batch.received {
                    seen.push((batch.address(at).to_vec(), batch.frame(at).map(<[u8]>::to_vec)));
                }
            }
        }
        use std::os::unix::ffi::OsStrExt as _;
        let name = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let expected = [
            (name(&short), Some(b"one".to_vec())),
            (Vec::new(), Some(b"two".to_vec())),
            (name(&long), Some(Vec::new())),
            (name(&long), Some(vec![7; FRAME_BYTES_MAX])),
            (name(&long), None),
        ];
        assert_eq!(seen[..5], expected);
        assert_eq!(seen[5..], expected);
        let _ = std::fs::remove_dir_all(&directory);
    }
}
