//! The control socket: what a daemon tells about itself, by HTTP on a Unix socket in the run directory, and how it is asked to
//! let another process take over.
//!
//! Only the owner of the run directory can reach it. A request for an upgrade is passed on to the keeper with its connection,
//! for this process will have ended when there is an answer. Nothing else that is asked for waits for a disk or keeps one open, a
//! request has a bounded size and bounded time, and few are answered at once: whoever asks cannot hold up guests.

use std::fs::{File, Permissions};
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::http::{self, REQUEST_BYTES_MAX, Refusal, Request, Route};
use super::metrics;
use super::status::{Identity, Status};
use super::upgrade::{self, Upgraded};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::fs::Fs;
use crate::store::{ServerInfo, Store};

/// Name of the socket, in the run directory.
const SOCKET: &str = "control.sock";

/// How long a request may take to come, and its response to go.
const PATIENCE: Duration = Duration::from_secs(5);

/// Requests that are answered at once.
const CONNECTIONS_MAX: usize = 8;

/// How long whoever asks tries again, for while another process takes over nobody answers.
const INTERLUDE: Duration = Duration::from_secs(3);

/// How often.
const RETRY: Duration = Duration::from_millis(10);

/// How long to wait after a connection could not be accepted (too many open files, say).
const PAUSE: Duration = Duration::from_millis(100);

/// Largest response that is read: a status with some hundred thousand disks.
const RESPONSE_BYTES_MAX: u64 = 64 << 20;

/// What the daemon is asked about.
#[derive(Debug)]
struct Subject {
    identity: Identity,
    fs: Arc<Fs>,
}

/// The listening socket; dropping it takes it away.
#[derive(Debug)]
pub(super) struct Control {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    run_dir: PathBuf,
}

impl Control {
    /// Listens in `run_dir`, in place of what an earlier daemon left there. The caller has the store's serve lock.
    ///
    /// # Errors
    /// Those of the host.
    pub(super) fn start(run_dir: &Path, identity: Identity, fs: Arc<Fs>) -> Result<Self> {
        let what = || format!("listen on {}", run_dir.join(SOCKET).display());
        remove_if_there(run_dir).context(what)?;
        let folder = File::open(run_dir).context(what)?;
        let path = short_path(&folder);
        let listener = UnixListener::bind(&path).context(what)?;
        // The folder lets nobody else in anyway.
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).context(what)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let subject = Arc::new(Subject { identity, fs });
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || listen(&listener, &subject, &stopped))
            .context(what)?;
        Ok(Self { stop, thread: Some(thread), run_dir: run_dir.to_owned() })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread.
        let woken = File::open(&self.run_dir).and_then(|folder| UnixStream::connect(short_path(&folder)));
        if let Err(error) = remove_if_there(&self.run_dir) {
            log::warn!("remove the control socket: {error}");
        }
        // Without its socket (somebody removed it) it cannot be woken, and ends with the process.
        if woken.is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the control thread panicked");
        }
    }
}

fn remove_if_there(run_dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(run_dir.join(SOCKET)) {
        Err(error) if error.kind() != IoKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The socket's path by way of the open folder: the path of a socket may have 107 bytes only.
fn short_path(folder: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
}

/// One of the few connections at a time.
struct Turn(Arc<AtomicUsize>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn listen(listener: &UnixListener, subject: &Arc<Subject>, stop: &AtomicBool) {
    let turns = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = listener.accept();
        if stop.load(Ordering::Acquire) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::debug!("control: accept: {error}");
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        let taken = turns.fetch_add(1, Ordering::AcqRel);
        let turn = Turn(Arc::clone(&turns));
        if taken >= CONNECTIONS_MAX {
            // An empty socket takes these few bytes without waiting.
            let _ = stream
                .set_nonblocking(true)
                .and_then(|()| (&stream).write_all(&http::refusal(Refusal::Busy)));
            continue;
        }
        let subject = Arc::clone(subject);
        let spawned = std::thread::Builder::new().name("control-request".to_owned()).spawn(move || {
            let _turn = turn;
            if let Err(error) = serve(&stream, &subject) {
                log::debug!("control: {error}");
            }
        });
        if let Err(error) = spawned {
            log::debug!("control: start a thread: {error}");
        }
    }
}

fn serve(stream: &UnixStream, subject: &Subject) -> std::io::Result<()> {
    let response = match read_request(stream, Instant::now() + PATIENCE)? {
        Ok(Route::Upgrade) => match subject.identity.upgrade(stream.as_fd()) {
            Ok(()) => return Ok(()),
            Err(error) => upgrade::response(Err(error)),
        },
        Ok(Route::Metrics) => answer(metrics_page(subject)),
        Ok(Route::Status) => answer(status_page(subject)),
        Err(refusal) => http::refusal(refusal),
    };
    write_all(stream, &response, Instant::now() + PATIENCE)
}

/// Reads a request until it is whole, is refused, or `end` has come.
fn read_request(
    mut stream: &UnixStream,
    end: Instant,
) -> std::io::Result<std::result::Result<Route, Refusal>> {
    let mut bytes = Vec::new();
    let mut piece = [0; 1024];
    loop {
        match http::read_request(&bytes) {
            Request::Whole(route) => return Ok(Ok(route)),
            Request::Refused(refusal) => return Ok(Err(refusal)),
            Request::Incomplete => {}
        }
        let Some(left) = time_left(end) else { return Ok(Err(Refusal::Late)) };
        stream.set_read_timeout(Some(left))?;
        let most = piece.len().min(REQUEST_BYTES_MAX - bytes.len());
        match stream.read(&mut piece[..most]) {
            Ok(0) => return Ok(Err(Refusal::Bad)),
            Ok(count) => bytes.extend_from_slice(&piece[..count]),
            Err(error) if is_timeout(&error) => return Ok(Err(Refusal::Late)),
            Err(error) if error.kind() == IoKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn write_all(mut stream: &UnixStream, bytes: &[u8], end: Instant) -> std::io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let left = time_left(end).ok_or(IoKind::TimedOut)?;
        stream.set_write_timeout(Some(left))?;
        match stream.write(&bytes[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == IoKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn time_left(end: Instant) -> Option<Duration> {
    end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), IoKind::WouldBlock | IoKind::TimedOut)
}

fn metrics_page(subject: &Subject) -> Result<Vec<u8>> {
    let page = metrics::page(&subject.identity, &subject.fs)?;
    Ok(http::response(metrics::CONTENT_TYPE, &page))
}

fn status_page(subject: &Subject) -> Result<Vec<u8>> {
    let status = subject.identity.status(&subject.fs)?;
    let text = serde_json::to_string_pretty(&status)
        .map_err(|error| Error::caused(ErrorKind::Invalid, "write JSON", error))?;
    Ok(http::response("application/json", &(text + "\n")))
}

fn answer(told: Result<Vec<u8>>) -> Vec<u8> {
    told.unwrap_or_else(|error| {
        log::warn!("control: {error}");
        http::refusal(Refusal::Failed)
    })
}

/// What the daemon that serves `store` tells about itself; `None` if none does.
///
/// # Errors
/// If a daemon serves it but does not answer; [`ErrorKind::Denied`] if it is another user's.
pub fn status(store: &Store) -> Result<Option<Status>> {
    let end = Instant::now() + INTERLUDE;
    loop {
        let Some(server) = store.serving()? else { return Ok(None) };
        match ask_for_status(store, &server) {
            Err(error) if error.kind() == ErrorKind::Denied || Instant::now() >= end => {
                // It may have ended meanwhile.
                return if store.serving()?.is_some() { Err(error) } else { Ok(None) };
            }
            Err(_) => std::thread::sleep(RETRY),
            told => return told.map(Some),
        }
    }
}

fn ask_for_status(store: &Store, server: &ServerInfo) -> Result<Status> {
    let what = || format!("ask the daemon (process {})", server.pid);
    let stream = connect(store).context(what)?;
    let body = ask(stream, b"GET /v1/status HTTP/1.1\r\nHost: cowdisk\r\n\r\n", PATIENCE).context(what)?;
    serde_json::from_slice(&body)
        .map_err(|error| Error::caused(ErrorKind::Io, what() + ": its answer is not understood", error))
}

/// Has the daemon that serves `store` replace the process that answers by one of the program that is now in the place from
/// which the daemon was started, while guests go on. Returns once that one answers.
///
/// # Errors
/// Why not, and the one of before answers then. [`ErrorKind::NotFound`] if no daemon serves it; [`ErrorKind::Denied`] if it is
/// another user's, or if others may write to that program; [`ErrorKind::Unsupported`] if the program does not speak the
/// protocol of the process that keeps the mount, or if none does; [`ErrorKind::Busy`] if requests wait for the host's disk too
/// long, so that trying again helps.
pub fn upgrade(store: &Store) -> Result<Upgraded> {
    let end = Instant::now() + INTERLUDE;
    let request = b"POST /v1/upgrade HTTP/1.1\r\nHost: cowdisk\r\nContent-Length: 0\r\n\r\n";
    loop {
        let Some(server) = store.serving()? else {
            let message = format!("store {}: not mounted", store.dir().display());
            return Err(Error::new(ErrorKind::NotFound, message));
        };
        let what = || format!("ask the daemon (process {})", server.pid);
        match connect(store).and_then(|stream| ask(stream, request, upgrade::PATIENCE + PATIENCE)) {
            Ok(body) => {
                return upgrade::read_answer(&body).ok_or_else(|| {
                    Error::new(ErrorKind::Io, what() + ": its answer is not understood")
                        .with_hint("cowdisk status shows which version serves")
                })?;
            }
            Err(error) if error.kind() == ErrorKind::Denied || Instant::now() >= end => {
                return Err(error.context(what()));
            }
            // Nobody answers between two processes. One that died with the request had passed it on to nobody: the keeper
            // would have the connection open still.
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

fn connect(store: &Store) -> Result<UnixStream> {
    let what = || "connect to its control socket";
    let folder = File::open(store.run_dir()?).context(what)?;
    UnixStream::connect(short_path(&folder)).context(what)
}

/// The body of the response to a request, which comes within `patience`.
fn ask(mut stream: UnixStream, request: &[u8], patience: Duration) -> Result<Vec<u8>> {
    let what = || "talk over its control socket";
    stream.set_read_timeout(Some(patience)).context(what)?;
    stream.set_write_timeout(Some(PATIENCE)).context(what)?;
    stream.write_all(request).context(what)?;
    let mut response = Vec::new();
    stream.take(RESPONSE_BYTES_MAX).read_to_end(&mut response).context(what)?;
    let strange = || Error::new(ErrorKind::Io, "it gives no good answer");
    http::body_of_response(&response).map(<[u8]>::to_vec).ok_or_else(strange)
}
