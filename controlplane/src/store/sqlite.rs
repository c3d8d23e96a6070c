//! `sqlite:FILE`: state and history in one file, safe against kill -9 (write-ahead log).
//!
//! The file is 0600 in a directory that only its user may enter. A lock beside it keeps a second
//! controlplane out; it ends with the process, however that ends.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use prost::Message;
use rusqlite::{Connection, OptionalExtension as _, Transaction, params, params_from_iter, types::Value};
use vnet_proto::model::Budget;
use vnet_proto::v1;

use super::retention::Census;
use super::schema::{MIGRATIONS, VERSION};
use super::{
    Class, EventQuery, History, Holder, LISTED_REVISIONS_MAX, Snapshot, Store, StoreError, StoredGrant,
    StoredVm, Write, confirmed, fallback_of,
};
use crate::lists::described;
use crate::paths;

/// A SQLite file, and the lock on it.
#[derive(Debug)]
pub struct SqliteStore {
    connection: Connection,
    /// `None`: to be taken anew.
    census: Option<Census>,
    lock: Flock<fs::File>,
}

impl SqliteStore {
    /// Opens or makes the file, and brings its schema up to date.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another controlplane has it, [`StoreError::Newer`] if a newer version
    /// wrote it.
    pub fn open(file: &Path) -> Result<Self, StoreError> {
        let open = |source| StoreError::Open {
            file: file.to_owned(),
            source,
        };
        let file = std::path::absolute(file).map_err(open)?;
        if let Some(dir) = file.parent()
            && (!dir.exists() || paths::state_dir().is_ok_and(|own| own == dir))
        {
            paths::ensure_private_dir(dir)?;
        }
        let lock = lock(&file)?;
        // Made here first, because SQLite would make it with the umask's mode.
        let made = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&file)
            .map_err(open)?;
        made.set_permissions(fs::Permissions::from_mode(0o600))
            .map_err(open)?;
        let connection = connect(&file).map_err(|error| match error {
            StoreError::Sqlite { source } => StoreError::Unusable { file, source },
            other => other,
        })?;
        Ok(Self {
            connection,
            census: None,
            lock,
        })
    }
}

fn connect(file: &Path) -> Result<Connection, StoreError> {
    let mut connection = Connection::open(file)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // Durable at each commit, also against a power cut: answers are given on the strength of it.
    connection.pragma_update(None, "synchronous", "FULL")?;
    migrate(&mut connection, file)?;
    Ok(connection)
}

#[cfg(test)]
impl SqliteStore {
    /// Has the file stay as it is, as on a full disk.
    pub(super) fn forbid_growth(&self) {
        let pages: i64 = self
            .connection
            .pragma_query_value(None, "page_count", |row| row.get(0))
            .unwrap();
        self.connection
            .pragma_update_and_check(None, "max_page_count", pages, |_| Ok(()))
            .unwrap();
    }
}

impl SqliteStore {
    fn revision(&self, name: &str, revision: u64) -> Result<Option<v1::Policy>, StoreError> {
        let message: Option<Vec<u8>> = self
            .connection
            .prepare_cached("SELECT message FROM policies WHERE name = ?1 AND revision = ?2")?
            .query_row(params![name, number(revision)], |row| row.get(0))
            .optional()?;
        let policy = message.map(|bytes| decode("policies", &bytes)).transpose()?;
        policy.map(|policy| self.with_lists(policy)).transpose()
    }

    /// With the content of its lists. One that is missing stays empty, and is refused where it is read.
    fn with_lists(&self, mut policy: v1::Policy) -> Result<v1::Policy, StoreError> {
        for list in &mut policy.lists {
            let content: Option<Vec<u8>> = self
                .connection
                .prepare_cached("SELECT content FROM lists WHERE sha256 = ?1")?
                .query_row([&list.sha256], |row| row.get(0))
                .optional()?;
            list.content = content.unwrap_or_default();
        }
        Ok(policy)
    }
}

impl Store for SqliteStore {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        let mut snapshot = Snapshot::default();
        let mut grants = self
            .connection
            .prepare("SELECT message, instances, uses FROM grants")?;
        let mut rows = grants.query([])?;
        while let Some(row) = rows.next()? {
            let (instances, uses): (String, String) = (row.get(1)?, row.get(2)?);
            snapshot.grants.push(StoredGrant {
                grant: decode(
                    "grants",
                    row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?,
                )?,
                instances: instances.lines().map(str::to_owned).collect(),
                uses: uses.lines().filter_map(read_use).collect(),
            });
        }
        let mut policies = self.connection.prepare(
            "SELECT message FROM policies AS p
             WHERE revision = (SELECT max(revision) FROM policies WHERE name = p.name)",
        )?;
        let mut rows = policies.query([])?;
        while let Some(row) = rows.next()? {
            let policy = decode(
                "policies",
                row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?,
            )?;
            let policy: v1::Policy = self.with_lists(policy)?;
            if let Some(fallback) = fallback_of(&policy) {
                snapshot.fallbacks.extend(self.revision(&policy.name, fallback)?);
            }
            snapshot.policies.push(policy);
        }
        let mut vms = self
            .connection
            .prepare("SELECT name, mode, labels, instance, wanted, process FROM vms")?;
        let mut rows = vms.query([])?;
        while let Some(row) = rows.next()? {
            let labels: String = row.get(2)?;
            snapshot.vms.insert(
                row.get(0)?,
                StoredVm {
                    mode: v1::Mode::try_from(row.get::<_, i32>(1)?).unwrap_or_default(),
                    labels: serde_json::from_str(&labels).unwrap_or_default(),
                    instance: row.get(3)?,
                    wanted: row.get(4)?,
                    process: row.get(5)?,
                },
            );
        }
        Ok(snapshot)
    }

    fn apply(&mut self, writes: &[Write]) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        for write in writes {
            match write {
                Write::PutGrant(stored) => transaction
                    .prepare_cached(
                        "INSERT OR REPLACE INTO grants (id, message, instances, uses) VALUES (?1, ?2, ?3, ?4)",
                    )?
                    .execute(params![
                        stored.grant.id,
                        stored.grant.encode_to_vec(),
                        stored.instances.join("\n"),
                        stored.uses.iter().map(write_use).collect::<String>()
                    ])?,
                Write::DeleteGrant(id) => transaction
                    .prepare_cached("DELETE FROM grants WHERE id = ?1")?
                    .execute([id])?,
                Write::PutPolicy(policy) => {
                    let mut insert = transaction
                        .prepare_cached("INSERT OR IGNORE INTO lists (sha256, content) VALUES (?1, ?2)")?;
                    let mut note = transaction.prepare_cached(
                        "INSERT OR IGNORE INTO list_uses (name, revision, sha256) VALUES (?1, ?2, ?3)",
                    )?;
                    for list in &policy.lists {
                        // One that comes without its content is there already, and named once more.
                        if !list.content.is_empty() {
                            insert.execute(params![list.sha256, list.content])?;
                        }
                        note.execute(params![policy.name, number(policy.revision), list.sha256])?;
                    }
                    let kept_from = policy.revision.saturating_sub(LISTED_REVISIONS_MAX - 1);
                    let fallback = fallback_of(policy).map_or(-1, number);
                    transaction
                        .prepare_cached(
                            "DELETE FROM list_uses WHERE name = ?1 AND revision < ?2 AND revision != ?3",
                        )?
                        .execute(params![policy.name, number(kept_from), fallback])?;
                    transaction
                        .prepare_cached(
                            "DELETE FROM lists WHERE NOT EXISTS
                             (SELECT 1 FROM list_uses WHERE list_uses.sha256 = lists.sha256)",
                        )?
                        .execute([])?;
                    let message = v1::Policy {
                        lists: described(&policy.lists),
                        ..policy.clone()
                    };
                    transaction
                        .prepare_cached("INSERT INTO policies (name, revision, message) VALUES (?1, ?2, ?3)")?
                        .execute(params![
                            policy.name,
                            number(policy.revision),
                            message.encode_to_vec()
                        ])?
                }
                Write::ConfirmPolicy { name, revision } => confirm(&transaction, name, *revision)?,
                Write::PutVm(name, Some(stored)) => transaction
                    .prepare_cached(
                        "INSERT OR REPLACE INTO vms (name, mode, labels, instance, wanted, process)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    )?
                    .execute(params![
                        name,
                        stored.mode as i32,
                        serde_json::Value::from_iter(stored.labels.clone()).to_string(),
                        stored.instance,
                        stored.wanted,
                        stored.process
                    ])?,
                Write::PutVm(name, None) => transaction
                    .prepare_cached("DELETE FROM vms WHERE name = ?1")?
                    .execute([name])?,
            };
        }
        Ok(transaction.commit()?)
    }

    fn policy(&mut self, name: &str, revision: u64) -> Result<Option<v1::Policy>, StoreError> {
        self.revision(name, revision)
    }

    fn revisions(&mut self, name: &str, before: u64, limit: usize) -> Result<Vec<v1::Policy>, StoreError> {
        let before = if before == 0 { i64::MAX } else { number(before) };
        let mut statement = self.connection.prepare_cached(
            "SELECT message FROM policies WHERE name = ?1 AND revision < ?2
             ORDER BY revision DESC LIMIT ?3",
        )?;
        let mut rows = statement.query(params![name, before, number(limit as u64)])?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            let policy: v1::Policy = decode(
                "policies",
                row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?,
            )?;
            found.push(v1::Policy {
                document: String::new(),
                ..policy
            });
        }
        Ok(found)
    }

    fn append_events(&mut self, events: &[v1::Event]) -> Result<u64, StoreError> {
        // Put back when all is done: what fails on the way is counted anew.
        let mut census = match self.census.take() {
            Some(census) => census,
            None => take_census(&self.connection)?,
        };
        let transaction = self.connection.transaction()?;
        let mut gone = 0;
        {
            let mut insert = transaction.prepare_cached(
                "INSERT INTO events (sequence, time_us, kind, message, class, vm) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?;
            let mut vms: BTreeSet<&str> = BTreeSet::new();
            for event in events {
                let time = event.time.and_then(|t| SystemTime::try_from(t).ok());
                let time = time.map_or(0, microseconds);
                let class = Class::of(event);
                insert.execute(params![
                    number(event.sequence),
                    time,
                    event.kind,
                    event.encode_to_vec(),
                    class as i64,
                    event.vm
                ])?;
                census.add(class, &event.vm, 1);
                if class == Class::Traffic {
                    vms.insert(&event.vm);
                }
            }
            let mut forget_of_vm = transaction.prepare_cached(
                "DELETE FROM events WHERE sequence IN
                 (SELECT sequence FROM events WHERE class = ?1 AND vm = ?2 ORDER BY sequence LIMIT ?3)",
            )?;
            for vm in vms {
                let excess = census.excess_of_vm(vm);
                if excess > 0 {
                    let traffic = Class::Traffic;
                    let forgotten = forget_of_vm.execute(params![traffic as i64, vm, number(excess)])?;
                    census.remove(traffic, vm, forgotten as u64);
                    gone += forgotten as u64;
                }
            }
            let mut forget = transaction.prepare_cached(
                "DELETE FROM events WHERE sequence IN
                 (SELECT sequence FROM events WHERE class = ?1 ORDER BY sequence LIMIT ?2) RETURNING vm",
            )?;
            for class in Class::ALL {
                let excess = census.excess(class);
                if excess > 0 {
                    let mut rows = forget.query(params![class as i64, number(excess)])?;
                    while let Some(row) = rows.next()? {
                        let vm = row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?;
                        census.remove(class, vm, 1);
                        gone += 1;
                    }
                }
            }
        }
        transaction.commit()?;
        self.census = Some(census);
        Ok(gone)
    }

    fn events(&mut self, query: &EventQuery) -> Result<Vec<v1::Event>, StoreError> {
        let mut sql = "SELECT message FROM events WHERE sequence > ?".to_owned();
        let mut values = vec![Value::from(number(query.after))];
        let mut also = |clause: &str, value: i64| {
            sql.push_str(clause);
            values.push(Value::from(value));
        };
        if query.before != 0 {
            also(" AND sequence < ?", number(query.before));
        }
        if let Some(start) = query.start {
            also(" AND time_us >= ?", microseconds(start));
        }
        if let Some(end) = query.end {
            also(" AND time_us < ?", microseconds(end));
        }
        if !query.kinds.is_empty() {
            // Numbers of an enum, so nothing in it needs quoting.
            let kinds: Vec<String> = query.kinds.iter().map(ToString::to_string).collect();
            sql.push_str(&format!(" AND kind IN ({})", kinds.join(",")));
        }
        sql.push_str(if query.oldest_first {
            " ORDER BY sequence LIMIT ?"
        } else {
            " ORDER BY sequence DESC LIMIT ?"
        });
        values.push(Value::from(number(query.limit as u64)));
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query(params_from_iter(values))?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            found.push(decode(
                "events",
                row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?,
            )?);
        }
        Ok(found)
    }

    fn open_history(&mut self) -> Result<History, StoreError> {
        let transaction = self.connection.transaction()?;
        let last: Option<i64> =
            transaction.query_row("SELECT max(sequence) FROM events", [], |row| row.get(0))?;
        let opened = transaction.execute("INSERT OR IGNORE INTO history_opened (one) VALUES (1)", [])?;
        transaction.commit()?;
        Ok(History {
            last_sequence: last.map_or(0, |last| u64::try_from(last).unwrap_or(0)),
            cut_off: opened == 0,
        })
    }

    fn close_history(&mut self) -> Result<(), StoreError> {
        self.connection.execute("DELETE FROM history_opened", [])?;
        Ok(())
    }

    fn sign(&mut self, serves: &str) {
        // As in `lock`.
        let _ = write_holder(&self.lock, serves);
    }
}

/// A VM's use of a budget as one line: connections, bytes up, bytes down, and the attachment.
fn write_use((vm, used): &(String, Budget)) -> String {
    format!(
        "{} {} {} {vm}\n",
        used.connections, used.bytes_up, used.bytes_down
    )
}

fn read_use(line: &str) -> Option<(String, Budget)> {
    let mut parts = line.splitn(4, ' ');
    let mut number = || parts.next()?.parse().ok();
    let used = Budget {
        connections: number()?,
        bytes_up: number()?,
        bytes_down: number()?,
    };
    Some((parts.next()?.to_owned(), used))
}

fn confirm(transaction: &Transaction<'_>, name: &str, revision: u64) -> Result<usize, StoreError> {
    let message: Option<Vec<u8>> = transaction
        .prepare_cached("SELECT message FROM policies WHERE name = ?1 AND revision = ?2")?
        .query_row(params![name, number(revision)], |row| row.get(0))
        .optional()?;
    let Some(message) = message else { return Ok(0) };
    let confirmed = confirmed(decode("policies", &message)?);
    Ok(transaction
        .prepare_cached("UPDATE policies SET message = ?3 WHERE name = ?1 AND revision = ?2")?
        .execute(params![name, number(revision), confirmed.encode_to_vec()])?)
}

fn take_census(connection: &Connection) -> Result<Census, StoreError> {
    let mut census = Census::default();
    let mut count = connection.prepare("SELECT class, vm, count(*) FROM events GROUP BY class, vm")?;
    let mut rows = count.query([])?;
    while let Some(row) = rows.next()? {
        let class: i64 = row.get(0)?;
        if let Some(class) = Class::ALL.into_iter().find(|c| *c as i64 == class) {
            let vm = row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?;
            let found: i64 = row.get(2)?;
            census.add(class, vm, u64::try_from(found).unwrap_or(0));
        }
    }
    Ok(census)
}

/// Takes the lock of a store, and signs it with this process's id.
fn lock(file: &Path) -> Result<Flock<fs::File>, StoreError> {
    let path = lock_path(file);
    let open = |source| StoreError::Open {
        file: path.clone(),
        source,
    };
    let handle = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(open)?;
    match Flock::lock(handle, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => {
            // What another is told: nothing fails without it, as on a full disk.
            let _ = write_holder(&lock, "");
            Ok(lock)
        }
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(StoreError::InUse {
            file: file.to_owned(),
            holder: holder(file),
        }),
        Err((_, e)) => Err(open(e.into())),
    }
}

fn lock_path(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

fn write_holder(mut lock: &fs::File, serves: &str) -> std::io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    lock.write_all(format!("{}\n{serves}\n", std::process::id()).as_bytes())
}

/// Who had the lock of a store last, as it signed.
pub(super) fn holder(file: &Path) -> Option<Holder> {
    let handle = fs::File::open(lock_path(file)).ok()?;
    let mut text = String::new();
    handle.take(HOLDER_BYTES_MAX).read_to_string(&mut text).ok()?;
    let mut lines = text.lines();
    let pid = lines.next()?.parse().ok()?;
    let serves = lines.next().filter(|line| !line.is_empty()).map(str::to_owned);
    Some(Holder { pid, serves })
}

/// A number, and a URL of a socket.
const HOLDER_BYTES_MAX: u64 = 512;

fn migrate(connection: &mut Connection, file: &Path) -> Result<(), StoreError> {
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found > VERSION {
        return Err(StoreError::Newer {
            file: file.to_owned(),
            found,
            known: VERSION,
        });
    }
    for (version, step) in MIGRATIONS.iter().enumerate().skip(found as usize) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(step.sql)?;
        if let Some(then) = step.then {
            then(&transaction)?;
        }
        transaction.pragma_update(None, "user_version", version as u32 + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

fn decode<M: Message + Default>(table: &'static str, bytes: &[u8]) -> Result<M, StoreError> {
    M::decode(bytes).map_err(|source| StoreError::Damaged { table, source })
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn microseconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_micros()).unwrap_or(i64::MAX))
}
